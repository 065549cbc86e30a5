"""Rotary embeddings of a Hugging Face ``config.json``.

Checked against ``modeling_rope_utils.py`` of transformers and the ``RotaryEmbedding`` classes of
its models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rapshee_engine.errors import WeightFileError
from rapshee_engine.models.config import RopeConfig
from rapshee_engine.models.fields import Fields
from rapshee_engine.models.limits import MAX_CONTEXT, rope_config, unchecked
from rapshee_engine.models.rope import (
    FloatArray,
    dynamic_inv_freq,
    linear_inv_freq,
    llama3_inv_freq,
    longrope_attention_factor,
    plain_inv_freq,
    with_factors,
    yarn_attention_factor,
    yarn_inv_freq,
)

__all__ = ["HF_ROPE_TYPES", "HfRope", "flat_rope"]

_TYPE_KEYS = MappingProxyType(
    {
        "default": frozenset(),
        "linear": frozenset({"factor"}),
        "dynamic": frozenset({"factor"}),
        "yarn": frozenset(
            {
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "factor",
                "finetuned",  # a remark
                "mscale",
                "mscale_all_dim",
                "original_max_position_embeddings",
                "truncate",
            }
        ),
        "longrope": frozenset(
            {
                "attention_factor",
                "factor",
                "long_factor",
                "original_max_position_embeddings",
                "short_factor",
            }
        ),
        "llama3": frozenset(
            {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        ),
    }
)
_COMMON_KEYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})

HF_ROPE_TYPES = MappingProxyType({name: name for name in _TYPE_KEYS})
"""``rope_type`` -> the rule that it means, one of `default`, `linear`, `dynamic`, `yarn`,
`longrope`, `llama3`."""


def flat_rope(fields: Fields) -> Fields:
    """``rope_parameters`` (transformers 5) or ``rope_scaling``."""
    key = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    if key == "rope_parameters" and fields.has("rope_scaling"):
        raise fields.unsupported("rope_scaling", "null beside rope_parameters")
    return fields.section(key)


@dataclass(frozen=True, slots=True)
class HfRope:
    """One rotary embedding as the file describes it.

    Attributes:
        fields: the file's top level.
        rope: the section with the scaling.
        rule: a value of `HF_ROPE_TYPES`.
        theta: base of the frequencies.
        trained_length: ``max_position_embeddings``.
        default_original: the original length where none is stated; None: the trained length.
    """

    fields: Fields
    rope: Fields
    rule: str
    theta: float
    trained_length: int
    default_original: int | None

    @classmethod
    def read(
        cls,
        fields: Fields,
        rope: Fields,
        *,
        types: Mapping[str, str],
        theta_key: str,
        default_theta: float,
        trained_length: int,
        default_original: int | None = None,
    ) -> HfRope:
        """Check the section's keys and read its rule and base.

        Args:
            types: ``rope_type`` -> rule, those that the family allows.
            theta_key: top-level key of the base, unless the section has it.
        """
        rule = types[_rope_type(rope, types)]
        rope.require_known(_COMMON_KEYS | _TYPE_KEYS[rule])
        top = fields.positive(theta_key, default_theta)
        theta = rope.positive("rope_theta", top)
        if fields.has(theta_key) and theta != top:
            raise rope.unsupported("rope_theta", f"{top!r}, as in the top-level {theta_key}")
        return cls(fields, rope, rule, theta, trained_length, default_original)

    @property
    def longest(self) -> int:
        """Tokens that the rule reaches."""
        reach = self.trained_length
        if self.rule == "dynamic":
            reach = int(self.trained_length * self.rope.positive("factor"))
        elif self.rule == "yarn":
            reach = int(self._original_length() * self._factor())
        return min(max(self.trained_length, reach), MAX_CONTEXT)

    def max_position(self, asked: int | None) -> int:
        """Context of the model; beyond a dynamic rule's trained length where it is asked for."""
        if self.rule == "dynamic":
            return min(max(asked or 0, self.trained_length), self.longest)
        return self.longest

    @unchecked
    def config(self, head_dim: int, length: int, *, may_be_partial: bool = False) -> RopeConfig:
        """The embedding for heads of ``head_dim`` in a context of ``length`` tokens."""
        rotated_dim = self._rotated_dim(head_dim) if may_be_partial else head_dim
        if not may_be_partial:
            self.rope.require_neutral({"partial_rotary_factor": 1.0})
        attention_factor = 1.0
        if self.rule == "yarn":
            inv_freq, attention_factor = self._yarn(rotated_dim)
        elif self.rule == "longrope":
            inv_freq, attention_factor = self._longrope(rotated_dim, length)
        elif self.rule == "dynamic":
            inv_freq = self._dynamic(rotated_dim, length)
        else:
            inv_freq = plain_inv_freq(self.theta, rotated_dim)
        if self.rule == "linear":
            inv_freq = linear_inv_freq(inv_freq, self.rope.positive("factor"))
        elif self.rule == "llama3":
            inv_freq = self._llama3(inv_freq)
        return rope_config(self.fields, inv_freq, attention_factor)

    def _rotated_dim(self, head_dim: int) -> int:
        holder = self.rope if self.rope.has("partial_rotary_factor") else self.fields
        share = holder.positive("partial_rotary_factor", 1.0)
        rotated_dim = int(head_dim * share)
        if share > 1 or rotated_dim < 2 or rotated_dim % 2:
            must = f"a share of the head's {head_dim} dimensions that is an even number"
            raise holder.invalid("partial_rotary_factor", must)
        return rotated_dim

    def _original_length(self) -> int:
        key = "original_max_position_embeddings"
        holder = self.fields if self.fields.has(key) else self.rope
        return holder.integer(key, 2, MAX_CONTEXT, self.default_original or self.trained_length)

    def _factor(self) -> float:
        return self.rope.positive("factor", self.trained_length / self._original_length())

    def _dynamic(self, rotated_dim: int, length: int) -> FloatArray:
        if rotated_dim <= 2:
            raise self.fields.unsupported("head_dim", "above 2 with dynamic scaling")
        factor, trained = self.rope.positive("factor"), self.trained_length
        if factor < 1:
            raise self.rope.invalid("factor", "1 or more")
        return dynamic_inv_freq(
            self.theta, rotated_dim, factor=factor, length=length, trained_length=trained
        )

    def _yarn(self, rotated_dim: int) -> tuple[FloatArray, float]:
        rope = self.rope
        if self.theta <= 1:
            reason = f"rope_theta must be above 1 with yarn, got {self.theta:g}"
            raise WeightFileError(rope.source, reason)
        factor = self._factor()
        # Zero counts as absent for all of these.
        optional = {
            key: rope.positive(key, 0.0) if rope.get(key) != 0 else 0.0
            for key in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")
        }
        inv_freq = yarn_inv_freq(
            self.theta,
            rotated_dim,
            factor=factor,
            original_length=self._original_length(),
            beta_fast=optional["beta_fast"] or 32.0,
            beta_slow=optional["beta_slow"] or 1.0,
            truncate=rope.flag("truncate", default=True),
        )
        default = yarn_attention_factor(factor, optional["mscale"], optional["mscale_all_dim"])
        return inv_freq, rope.positive("attention_factor", default)

    def _longrope(self, rotated_dim: int, length: int) -> tuple[FloatArray, float]:
        original = self._original_length()
        # Both are checked, whichever is used.
        short, long = (
            self.rope.positives(f"{which}_factor", rotated_dim // 2) for which in ("short", "long")
        )
        plain = plain_inv_freq(self.theta, rotated_dim)
        default = longrope_attention_factor(self._factor(), original)
        inv_freq = with_factors(plain, long if length > original else short)
        return inv_freq, self.rope.positive("attention_factor", default)

    def _llama3(self, inv_freq: FloatArray) -> FloatArray:
        rope = self.rope
        low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
        if low >= high:
            raise rope.invalid("high_freq_factor", f"above low_freq_factor ({low:g})")
        return llama3_inv_freq(
            inv_freq,
            factor=rope.positive("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_context=self._original_length(),
        )


def _rope_type(rope: Fields, types: Mapping[str, str]) -> str:
    """``rope_type``, or ``type`` as it was called before transformers 4.43."""
    rope_type = rope.choice("type", types, "default")
    if not rope.has("rope_type"):
        return rope_type
    if rope.has("type"):
        rope.require_neutral({"rope_type": rope_type})
    return rope.choice("rope_type", types)
