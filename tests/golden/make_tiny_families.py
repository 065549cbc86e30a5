"""Makes ``tiny_families.npz``: logits of tiny random checkpoints of every family and rotary
scaling, by transformers in float32.

Run from the root of the repository, after ``pip install '.[oracle]'``:

    PYTHONPATH=tests python -m golden.make_tiny_families
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from golden.make_tiny_llama import build
from reference.golden import GOLDEN_FOLDER
from reference.tiny_families import family_config, family_weights

NUM_TOKENS = 40

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]
SHORT = [1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.3]
LONGROPE = {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT}


def case(
    model_type: str, *, context_length: int | None = None, gguf: bool = True, **changes: Any
) -> dict[str, Any]:
    """``gguf``: whether a GGUF file can say all of it."""
    config = family_config(model_type, **changes)
    return {"config": config, "context_length": context_length, "gguf": gguf}


CASES = {
    "qwen2": case("qwen2", tie_word_embeddings=False, sliding_window=None),
    "qwen2_window": case(
        "qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1, gguf=False
    ),
    "qwen2_yarn": case("qwen2", max_position_embeddings=16, rope_scaling=YARN),
    "qwen3_yarn": case(
        "qwen3",
        max_position_embeddings=64,
        rope_scaling={**YARN, "attention_factor": 1.3, "beta_fast": 8, "beta_slow": 0.5},
    ),
    "gemma2": case("gemma2"),
    "gemma2_without_caps": case(
        "gemma2",
        attention_bias=True,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        query_pre_attn_scalar=40,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        gguf=False,
    ),
    "gemma3": case("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma3_rope_parameters": case(
        "gemma3_text",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_theta=None,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        },
        final_logit_softcapping=4.0,
        tie_word_embeddings=False,
        gguf=False,
    ),
    "phi3": case("phi3", sliding_window=9, tie_word_embeddings=False),
    "phi3_partial_long": case(
        "phi3",
        partial_rotary_factor=0.75,
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", "long_factor": LONG[:6], "short_factor": SHORT[:6]},
    ),
    "phi3_short": case(
        "phi3", original_max_position_embeddings=64, rope_scaling=LONGROPE, context_length=64
    ),
    "smollm3": case("smollm3"),
    "smollm3_lists": case(
        "smollm3",
        num_hidden_layers=3,
        no_rope_layers=[0, 1, 0],
        use_sliding_window=True,
        sliding_window=7,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        gguf=False,
    ),
    "olmo2": case("olmo2", tie_word_embeddings=False),
    "granite": case("granite"),
    "granite_biases": case(
        "granite", attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "llama_dynamic": case(
        "llama",
        max_position_embeddings=24,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0},
        context_length=NUM_TOKENS,
        gguf=False,
    ),
    "llama_longrope": case(
        "llama", rope_scaling={**LONGROPE, "original_max_position_embeddings": 16}
    ),
    "llama_yarn_options": case(
        "llama",
        max_position_embeddings=64,
        rope_scaling={**YARN, "truncate": False, "mscale": 0.8, "mscale_all_dim": 0.5},
        gguf=False,
    ),
}


def explicit(config: dict[str, Any]) -> dict[str, Any]:
    """Without nulls, but for soft caps, which have a value where they are absent."""
    return {k: v for k, v in config.items() if v is not None or k.endswith("softcapping")}


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(2)
    cases, arrays = [], {}
    for seed, (name, one) in enumerate(CASES.items(), start=1):
        config = one["config"]
        model = build(explicit(config), family_weights(config, seed))
        random = np.random.RandomState(2000 + seed)
        token_ids = random.randint(0, config["vocab_size"], NUM_TOKENS).astype(np.int32)
        logits = model(torch.from_numpy(token_ids).long()[None]).logits[0].numpy()
        print(f"{name}: logits {logits.std():.2f} +- {np.abs(logits).max():.2f}")
        cases.append({"name": name, "seed": seed, **one})
        arrays[f"{name}.token_ids"] = token_ids
        arrays[f"{name}.logits"] = logits
    np.savez_compressed(
        GOLDEN_FOLDER / "tiny_families.npz", cases=np.array(json.dumps(cases)), **arrays
    )


if __name__ == "__main__":
    main()
