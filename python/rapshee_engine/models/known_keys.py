"""What each hyper-parameter key of a checkpoint means to this engine.

*Honoured* keys are read by `hf_config` and `gguf_config`; *harmless* ones do not enter the forward
pass; *neutral* ones may have one value only, which leaves it as implemented. A family may have keys
of its own, in its line of `hf_families` or `gguf_families`. Any other key is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = [
    "GGUF_HARMLESS",
    "GGUF_HONOURED",
    "GGUF_NEUTRAL",
    "HF_HARMLESS",
    "HF_HONOURED",
    "HF_NEUTRAL",
]

HF_HONOURED = frozenset(
    {
        "attention_bias",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "vocab_size",
    }
)
# Training, sampling defaults, bookkeeping and output switches: none enters the forward pass.
HF_HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "do_sample",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "max_length",
        "max_sequence_length",
        "min_length",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)
# Keys whose other values would change the results.
HF_NEUTRAL: Mapping[str, Any] = MappingProxyType(
    {
        "add_cross_attention": False,
        "is_decoder": False,
        "is_encoder_decoder": False,
        "partial_rotary_factor": 1.0,
        "pretraining_tp": 1,
        "pruned_heads": {},
        "rope_interleaved": False,
        "tie_encoder_decoder": False,
    }
)

GGUF_HONOURED = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_log_multiplier",
        "vocab_size",
    }
)
GGUF_HARMLESS = frozenset({"rope.scaling.finetuned"})
GGUF_NEUTRAL: Mapping[str, Any] = MappingProxyType(
    {
        "attention.causal": True,
        "expert_count": 0,
        "expert_used_count": 0,
        "rope.scaling.yarn_ext_factor": 1.0,
        "tensor_data_layout": "Meta AI original pth",
    }
)
