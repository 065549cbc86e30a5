"""Options of the engine, common to the commands that run one."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from rapshee_engine.errors import ConfigError

__all__ = ["add_engine_options", "engine_options"]

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_SIZE_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def add_engine_options(command: Any) -> None:
    group = command.add_argument_group("engine")
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda (the first GPU), cuda:1, or auto: a GPU where there is one (%(default)s)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of unquantised weights and the KV cache; float16 on CUDA, float32 on CPU only "
        "(%(default)s)",
    )
    group.add_argument(
        "--kv-dtype",
        default="auto",
        choices=("auto", "bf16", "int8"),
        help="of the KV cache; int8, half the size of bf16, on CPU only (%(default)s)",
    )
    group.add_argument(
        "--quantize",
        choices=("q8", "q4"),
        help="make the matrices of an unquantised model 8 or 4 bits wide, once; kept in the cache",
    )
    group.add_argument(
        "--load-format",
        default="auto",
        choices=("auto", "gguf", "safetensors", "dummy"),
        help="dummy: random weights for the config.json in the model's folder (%(default)s)",
    )
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="context in tokens (default: the model's)"
    )
    group.add_argument(
        "--kv-cache-memory",
        type=_size,
        metavar="SIZE",
        help="memory for the KV cache, such as 512M or 2G (default: what --max-num-seqs full "
        "contexts need, at most a quarter of what is free, 90 %% on a GPU)",
    )
    group.add_argument(
        "--block-size", type=int, metavar="N", help="tokens of a KV block (default: the device's)"
    )
    group.add_argument(
        "--max-num-seqs", type=int, metavar="N", default=64, help="that run at once (%(default)s)"
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        default=512,
        help="most tokens of one step (%(default)s)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="(default: the physical cores)")
    group.add_argument(
        "--no-prefix-caching", action="store_true", help="compute equal prompt beginnings anew"
    )
    group.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="prepare a step while another runs (default: on a GPU)",
    )
    group.add_argument(
        "--no-deterministic",
        action="store_true",
        help="on CUDA: let a request's rounding depend on what else runs, where that is faster "
        "(needs cuBLASLt: pip install nvidia-cublas)",
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="Jinja template (default: the model's own)"
    )


def engine_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": options.device,
        "dtype": options.dtype,
        "kv_dtype": options.kv_dtype,
        "quantize": options.quantize,
        "load_format": options.load_format,
        "max_model_len": options.max_model_len,
        "kv_cache_memory_bytes": options.kv_cache_memory,
        "block_size": options.block_size,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "enable_prefix_caching": not options.no_prefix_caching,
        "async_scheduling": options.async_scheduling,
        "deterministic": not options.no_deterministic,
        "threads": options.threads,
        "chat_template": _template(options.chat_template),
    }


def _template(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --chat-template {name}: {error}") from None


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 512M or 2G")
    return int(match[1]) << _SIZE_SHIFT[match[2].lower()]
