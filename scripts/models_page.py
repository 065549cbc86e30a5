#!/usr/bin/env python3
"""Makes docs/models.md from the tables that the engine itself reads.

python scripts/models_page.py          # writes the page
python scripts/models_page.py --check  # exits with 1 where it is not up to date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rapshee_engine.models.config import ModelConfig
from rapshee_engine.models.gguf_families import GGUF_FAMILIES
from rapshee_engine.models.gguf_rope import GGUF_ROPE_TYPES
from rapshee_engine.models.hf_config import config_from_hf
from rapshee_engine.models.hf_families import HF_FAMILIES
from rapshee_engine.models.hf_rope import HF_ROPE_TYPES
from rapshee_engine.weights.gguf import TENSOR_TYPES
from rapshee_engine.weights.safetensors import SAFETENSORS_DTYPES
from rapshee_engine.weights.tensor_info import BLOCK_LAYOUTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
GOLDENS = [ROOT / "tests" / "golden" / f"tiny_{name}.npz" for name in ("llama", "families")]

# (published models, model_type, general.architecture)
FAMILIES = (
    ("Llama 2 and 3, SmolLM2, TinyLlama", "llama", "llama"),
    ("Mistral", "mistral", "llama"),
    ("Qwen2, Qwen2.5", "qwen2", "qwen2"),
    ("Qwen3 (dense)", "qwen3", "qwen3"),
    ("Gemma 2", "gemma2", "gemma2"),
    ("Gemma 3 (text)", "gemma3_text", "gemma3"),
    ("Phi-3, Phi-3.5, Phi-4, Phi-4-mini", "phi3", "phi3"),
    ("SmolLM3", "smollm3", "smollm3"),
    ("OLMo 2", "olmo2", "olmo2"),
    ("Granite 3 (dense)", "granite", "granite"),
)

# Values of keys that bring a mechanism about; a family is given those that it honours.
KEYS = {
    "attention_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "max_window_layers": 1,
    "partial_rotary_factor": 0.5,
    "residual_multiplier": 0.5,
    "use_sliding_window": True,
}
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip

# Rule -> what it is, in which tensors or keys of a GGUF file.
RULES = {
    "default": ("as trained", "`none`"),
    "linear": ("positions divided by a factor", "`linear`"),
    "dynamic": ("a base that grows with the context beyond the trained one", "—"),
    "yarn": ("YaRN: fast dimensions kept, slow ones stretched", "`yarn`"),
    "longrope": ("LongRoPE: a factor a dimension, for short and for long contexts",
                 "`longrope`, `rope_factors_long`, `rope_factors_short`"),
    "llama3": ("Llama 3.1's blend of kept and stretched dimensions", "`rope_freqs`"),
}  # fmt: skip


def example(model_type: str) -> ModelConfig:
    """A model of the family with all mechanisms that its keys can ask for."""
    family = HF_FAMILIES[model_type]
    config: dict[str, Any] = {"model_type": model_type, **SIZES}
    config |= {key: value for key, value in KEYS.items() if key in family.keys}
    if model_type in ("phi3", "smollm3"):  # without a window unless they say so
        config["sliding_window"] = 7
    return config_from_hf(config, model_type)


def mechanisms(model_type: str) -> list[str]:
    """What differs from a plain llama."""
    config, family = example(model_type), HF_FAMILIES[model_type]
    found = {
        "biases of Q, K, V": family.qkv_bias,
        "optional biases": family.attention_bias or family.mlp_bias,
        "norms of each Q and K head": config.qk_norm == "head",
        "norms of whole Q and K rows": config.qk_norm == "row",
        "norms before and after": config.pre_norm and config.post_norm,
        "norms after instead of before": config.post_norm and not config.pre_norm,
        "norm weights less 1": config.norm_zero_centered,
        "GELU (tanh)": config.activation == "gelu_tanh",
        "scaled embeddings": config.embed_scale != 1,
        "scaled residuals": config.residual_scale != 1,
        "scaled logits": config.logit_scale != 1,
        "soft-capped scores": config.attn_softcap > 0,
        "soft-capped logits": config.final_softcap > 0 or "final_logit_softcapping" in family.keys,
        "query scale of its own": config.query_scale != config.head_dim**-0.5,
        **_layer_mechanisms(config),
        "partial rotation": family.partial_rotation,
    }
    return [name for name, is_there in found.items() if is_there]


def _layer_mechanisms(config: ModelConfig) -> dict[str, bool]:
    windows = {layer.window for layer in config.layers}
    return {
        "sliding window": windows != {0} and 0 not in windows,
        "sliding window in some layers": len(windows) > 1,
        "two rope bases": len(config.ropes) > 1,
        "layers without rotation": any(layer.rope < 0 for layer in config.layers),
    }


def golden_cases() -> list[dict[str, Any]]:
    """``name`` and ``config`` of each golden of a tiny checkpoint."""
    cases = []
    for path in GOLDENS:
        with np.load(path) as stored:
            cases += json.loads(str(stored["cases"]))
    return cases


def rule_of(config: Mapping[str, Any]) -> str:
    """Rotary rule of a golden's configuration."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    name = rope.get("rope_type", rope.get("type", "default"))
    return HF_FAMILIES[config["model_type"]].rope_types[name]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def families_table(cases: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for names, model_type, architecture in FAMILIES:
        goldens = [c["name"] for c in cases if c["config"]["model_type"] == model_type]
        rows.append(
            (
                names,
                f"`{model_type}`",
                f"`{architecture}`",
                ", ".join(mechanisms(model_type)) or "—",
                ", ".join(goldens),
            )
        )
    return table(("models", "`model_type`", "GGUF", "beside a plain decoder", "goldens"), rows)


def ropes_table(cases: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for rule, (what, gguf) in RULES.items():
        who = [name for name, f in HF_FAMILIES.items() if rule in f.rope_types.values()]
        by = "all" if len(who) == len(HF_FAMILIES) else f"all but {_missing(who)}"
        goldens = [c["name"] for c in cases if rule_of(c["config"]) == rule]
        tested = ", ".join(goldens) if rule != "default" else "all others"
        rows.append((f"`{rule}`", what, by, gguf, tested))
    return table(("`rope_type`", "what it does", "families", "in GGUF", "goldens"), rows)


def _missing(who: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in HF_FAMILIES if name not in who)


def formats_table() -> str:
    in_gguf = {name.lower(): name for name in TENSOR_TYPES.values()}
    in_safetensors = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    rows = []
    for dtype, (values, nbytes) in BLOCK_LAYOUTS.items():
        rows.append(
            (
                f"`{dtype}`",
                f"{nbytes * 8 / values:g}",
                in_gguf.get(dtype, "—"),
                in_safetensors.get(dtype, "—"),
            )
        )
    return table(("format", "bits a weight", "GGUF", "safetensors"), rows)


def check_tables() -> None:
    """Nothing that the engine reads is left out here, or the other way round."""
    assert {row[1] for row in FAMILIES} == set(HF_FAMILIES)
    assert {row[2] for row in FAMILIES} == set(GGUF_FAMILIES)
    assert set(RULES) == set(HF_ROPE_TYPES.values())
    assert all(any(f"`{name}`" in gguf for _, gguf in RULES.values()) for name in GGUF_ROPE_TYPES)
    assert set(BLOCK_LAYOUTS) >= {name.lower() for name in TENSOR_TYPES.values()}


def render() -> str:
    check_tables()
    cases = golden_cases()
    return f"""<!-- Made by scripts/models_page.py; change that. -->
# Models

What this engine reads. Every key of a configuration and every tensor is honoured, known to be
without effect, or refused by name.

## Families

{families_table(cases)}

A *golden* is what transformers computes in float32 with a tiny random checkpoint: the engine's
log-probabilities agree with it within 0.001 at every position, in prefill, in chunks and in decode,
on each instruction set, from a Hugging Face folder and, where the format can say all of it, from a
GGUF file (`tests/runner/test_families.py`, `tests/end_to_end/test_goldens.py`). Devices without
float32 are held to them on average.

llama.cpp leaves out Phi-3's sliding window and YaRN's factor and bounds; here they count in GGUF
files too.

## Rotary embeddings

{ropes_table(cases)}

What a scaling computes never depends on what was computed before. `dynamic` and `longrope` follow
the context that the model is loaded for (`max_model_len`, else the checkpoint's): plain frequencies
or short factors up to the original length, beyond it what transformers has at exactly that length.
A model that serves short contexts is best loaded with a short `max_model_len`.

## Weights

{formats_table()}

Each is compared with numpy on the dequantised values, in float and in 8-bit activations
(`tests/ops/test_linear.py`), and its dequantisation with ggml's own
(`tests/golden/quant_blocks.npz`).
"""


def main(arguments: Sequence[str]) -> int:
    page = render()
    if "--check" in arguments:
        return int(PAGE.read_text() != page)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
