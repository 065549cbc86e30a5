"""Makes ``tiny_llama.npz``: logits of tiny random checkpoints, by transformers in float32.

Run from the root of the repository, after ``pip install '.[oracle]'``:

    PYTHONPATH=tests python -m golden.make_tiny_llama
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from reference.golden import GOLDEN_FOLDER
from reference.tiny_llama import make_config, make_weights

NUM_TOKENS = 40

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

QWEN3 = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_window_layers": 1,
    "use_sliding_window": False,
}

CASES: dict[str, dict[str, Any]] = {
    "mha": make_config(num_key_value_heads=4),
    "gqa": make_config(num_attention_heads=8, num_key_value_heads=2, hidden_size=128),
    "mqa": make_config(num_key_value_heads=1),
    "untied": make_config(tie_word_embeddings=False),
    "head_dim_32": make_config(head_dim=32),
    "head_dim_64": make_config(hidden_size=192, num_attention_heads=3, num_key_value_heads=1),
    "biases": make_config(attention_bias=True, mlp_bias=True),
    "rope_theta": make_config(rope_theta=500000.0, rms_norm_eps=1e-6),
    "rope_linear": make_config(rope_scaling={"type": "linear", "factor": 4.0}),
    "rope_llama3": make_config(head_dim=32, rope_scaling=LLAMA3_SCALING),
    "rope_parameters": {
        key: value
        for key, value in make_config(
            head_dim=32, rope_parameters={"rope_theta": 20000.0, **LLAMA3_SCALING}
        ).items()
        if key != "rope_theta"
    },
    "mistral_window": make_config(
        model_type="mistral", sliding_window=7, tie_word_embeddings=False
    ),
    "mistral_full": make_config(model_type="mistral", sliding_window=None),
    "qwen3": make_config(
        model_type="qwen3", num_attention_heads=6, head_dim=32, sliding_window=None, **QWEN3
    ),
    "qwen3_biases": make_config(
        model_type="qwen3", head_dim=16, attention_bias=True, tie_word_embeddings=False, **QWEN3
    ),
    "qwen3_window": make_config(
        model_type="qwen3", head_dim=16, sliding_window=7, **{**QWEN3, "use_sliding_window": True}
    ),
}


def build(
    config: Mapping[str, Any], weights: Mapping[str, npt.NDArray[np.float32]]
) -> torch.nn.Module:
    """transformers' model of that configuration with these weights."""
    # Deep-copied by way of JSON: transformers edits the dictionaries that it is given.
    options = json.loads(json.dumps(config))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**options), attn_implementation="eager"
    )
    tensors = {name: torch.from_numpy(w) for name, w in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if config["tie_word_embeddings"] else []
    assert (missing, unexpected) == (tied, [])
    return model.float().eval()


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(2)
    cases, arrays = [], {}
    for seed, (name, config) in enumerate(CASES.items(), start=1):
        model = build(config, make_weights(config, seed))
        random = np.random.RandomState(1000 + seed)
        token_ids = random.randint(0, config["vocab_size"], NUM_TOKENS).astype(np.int32)
        logits = model(torch.from_numpy(token_ids).long()[None]).logits[0].numpy()
        print(f"{name}: logits {logits.std():.2f} +- {np.abs(logits).max():.2f}")
        cases.append({"name": name, "config": config, "seed": seed})
        arrays[f"{name}.token_ids"] = token_ids
        arrays[f"{name}.inv_freq"] = model.model.rotary_emb.inv_freq.numpy()
        arrays[f"{name}.logits"] = logits
    np.savez_compressed(
        GOLDEN_FOLDER / "tiny_llama.npz", cases=np.array(json.dumps(cases)), **arrays
    )


if __name__ == "__main__":
    main()
