"""Rotary embeddings of a GGUF file.

Checked against ``llama-model.cpp``, ``llama-context.cpp`` and ``ggml.c`` of llama.cpp, and against
its converter, which writes what transformers reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rapshee_engine.errors import WeightFileError
from rapshee_engine.models.config import RopeConfig
from rapshee_engine.models.fields import Fields
from rapshee_engine.models.limits import MAX_CONTEXT, rope_config, unchecked
from rapshee_engine.models.rope import (
    FloatArray,
    linear_inv_freq,
    plain_inv_freq,
    with_factors,
    yarn_attention_factor,
    yarn_inv_freq,
)

__all__ = ["GGUF_ROPE_TYPES", "ROPE_FACTORS", "GgufRope"]

GGUF_ROPE_TYPES = ("none", "linear", "yarn", "longrope")
"""Values of ``rope.scaling.type``."""

_ALWAYS, _LONG, _SHORT = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
ROPE_FACTORS = (_ALWAYS, _LONG, _SHORT)
"""Tensors that divide the frequencies one by one: always (llama3), or in long and short contexts
(LongRoPE)."""

_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class GgufRope:
    """One rotary embedding as the file describes it.

    Attributes:
        fields: the metadata below the architecture's prefix.
        factors: values of those `ROPE_FACTORS` that the file has.
        rule: a value of `GGUF_ROPE_TYPES`.
        interleaved: Q and K rows that rotate together are neighbours in the file.
        may_be_partial: rotation may leave out the last dimensions of a head; with ``interleaved``
            it always may.
    """

    fields: Fields
    factors: Mapping[str, Sequence[float]]
    rule: str
    interleaved: bool
    may_be_partial: bool

    @classmethod
    def read(
        cls,
        fields: Fields,
        factors: Mapping[str, Sequence[float]],
        *,
        interleaved: bool,
        may_be_partial: bool,
    ) -> GgufRope:
        # A factor without a type stretches all, as it did before there were types.
        default = "linear" if fields.has("rope.scaling.factor") else "none"
        rule = fields.choice("rope.scaling.type", GGUF_ROPE_TYPES, default)
        if _LONG in factors or _SHORT in factors:
            rule = "longrope"
        if rule == "longrope":
            _check_longrope(fields, factors)
        return cls(fields, factors, rule, interleaved, may_be_partial)

    def max_position(self) -> int:
        """Context of the model."""
        trained = self._trained_length()
        reach = trained
        if self.rule == "yarn":
            reach = int(self._original_length() * self.fields.positive("rope.scaling.factor"))
        return min(max(trained, reach), MAX_CONTEXT)

    @unchecked
    def config(self, head_dim: int, length: int) -> RopeConfig:
        """The embedding for heads of ``head_dim`` in a context of ``length`` tokens."""
        fields, rotated_dim = self.fields, self._rotated_dim(head_dim)
        theta = fields.positive("rope.freq_base", _DEFAULT_THETA)
        attention_factor = 1.0
        if self.rule == "yarn":
            inv_freq, attention_factor = self._yarn(theta, rotated_dim)
        else:
            inv_freq = plain_inv_freq(theta, rotated_dim)
        if self.rule == "linear":
            inv_freq = linear_inv_freq(inv_freq, fields.positive("rope.scaling.factor"))
        elif self.rule == "longrope":
            used = _LONG if length > self._original_length() else _SHORT
            self._factors(_LONG if used == _SHORT else _SHORT, len(inv_freq))
            inv_freq = with_factors(inv_freq, self._factors(used, len(inv_freq)))
        if _ALWAYS in self.factors:
            inv_freq = with_factors(inv_freq, self._factors(_ALWAYS, len(inv_freq)))
        if self.interleaved:
            # Q and K rows are brought from neighbouring pairs to half-head pairs over the whole
            # head, so what a partial rotation leaves alone are the last pairs: they turn with
            # frequency zero.
            inv_freq = np.pad(inv_freq, (0, (head_dim - rotated_dim) // 2))
        attention_factor *= fields.positive("rope.scaling.attn_factor", 1.0)
        return rope_config(fields, inv_freq, attention_factor)

    def local_config(self, head_dim: int, default_theta: float) -> RopeConfig:
        """The second embedding of a family whose layers with a window have their own: its scalings
        are for the layers that see everything."""
        theta = self.fields.positive("rope.freq_base_swa", default_theta)
        return rope_config(self.fields, plain_inv_freq(theta, self._rotated_dim(head_dim)))

    def _trained_length(self) -> int:
        return self.fields.integer("context_length", 1, MAX_CONTEXT)

    def _original_length(self) -> int:
        key = "rope.scaling.original_context_length"
        return self.fields.integer(key, 1, MAX_CONTEXT, self._trained_length())

    def _rotated_dim(self, head_dim: int) -> int:
        if not (self.interleaved or self.may_be_partial):
            self.fields.require_neutral({"rope.dimension_count": head_dim})
        rotated_dim = self.fields.integer("rope.dimension_count", 1, head_dim, head_dim)
        if rotated_dim % 2:
            raise self.fields.invalid("rope.dimension_count", "even")
        return rotated_dim

    def _yarn(self, theta: float, rotated_dim: int) -> tuple[FloatArray, float]:
        fields = self.fields
        if theta <= 1:
            reason = f"{fields.path_of('rope.freq_base')} must be above 1 with yarn, got {theta:g}"
            raise WeightFileError(fields.source, reason)
        factor = fields.positive("rope.scaling.factor")
        inv_freq = yarn_inv_freq(
            theta,
            rotated_dim,
            factor=factor,
            original_length=self._original_length(),
            beta_fast=fields.positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.positive("rope.scaling.yarn_beta_slow", 1.0),
        )
        # The multiplier is transformers' mscale_all_dim, beside an mscale of 1.
        key = "rope.scaling.yarn_log_multiplier"
        multiplier = 0.0 if fields.get(key) == 0 else fields.positive(key, 0.0)
        default = yarn_attention_factor(factor, 1.0, multiplier)
        return inv_freq, fields.positive("rope.scaling.yarn_attn_factor", default)

    def _factors(self, name: str, count: int) -> Sequence[float]:
        factors = self.factors[name]
        if len(factors) != count:
            reason = f"must have {count} values, got {len(factors)}"
        elif not all(math.isfinite(factor) and factor > 0 for factor in factors):
            reason = "its values must be finite and above 0"
        else:
            return factors
        raise WeightFileError(self.fields.source, reason, tensor=name)


def _check_longrope(fields: Fields, factors: Mapping[str, Sequence[float]]) -> None:
    for name in (_LONG, _SHORT):
        if name not in factors:
            raise WeightFileError(fields.source, "is missing", tensor=name)
    if _ALWAYS in factors:
        raise WeightFileError(fields.source, f"stands beside {_LONG}", tensor=_ALWAYS)
    if fields.has("rope.scaling.type"):
        fields.choice("rope.scaling.type", ("none", "longrope"))
    fields.require_neutral({"rope.scaling.factor": 1.0})
