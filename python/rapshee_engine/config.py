"""Options of one engine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType

from rapshee_engine.errors import ConfigError

__all__ = ["EngineConfig"]

_DEVICE = re.compile(r"auto|cpu|cuda(-emu)?(:\d+)?")
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_KV_DTYPES = ("auto", "bf16", "int8")
_QUANTIZATIONS = ("q8", "q4")
_LOAD_FORMATS = ("auto", "gguf", "safetensors", "dummy")
_MOST = MappingProxyType(
    {
        "max_model_len": (1 << 31) - 1,
        "kv_cache_memory_bytes": 1 << 62,
        "block_size": 4096,
        "threads": 1024,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that `LLM(...)` and `AsyncEngine(...)` accept.

    Attributes:
        model: path of a GGUF file or of a Hugging Face folder.
        device: ``auto`` (the first GPU where this build and machine have one, else ``cpu``),
            ``cpu``, ``cuda`` (the first GPU), ``cuda:1``, or ``cuda-emu`` in builds for tests.
        dtype: of unquantised weights and, unless ``kv_dtype`` says otherwise, of the KV cache:
            ``auto``, ``bfloat16``, ``float32`` (CPU only) or ``float16`` (CUDA only). ``auto`` is
            float32 for a float32 checkpoint on CPU, else bfloat16. Quantised weights stay as they
            are.
        kv_dtype: of the KV cache: ``auto`` (that of the computation), ``bf16``, or, on CPU only,
            ``int8``, half the size of bf16, with a scale for each token and KV head.
        quantize: None, or what the matrices of an unquantised checkpoint become: ``q8`` (Q8_0), or
            ``q4`` (Q4_1; the embedding and the head Q8_0). They are made once and kept in
            ``quantized/`` of the cache folder.
        load_format: ``auto`` (by what lies at the path), ``gguf``, ``safetensors``, or ``dummy``
            (the folder's ``config.json`` with random weights, for benchmarks; without a
            tokenizer beside it the engine takes token ids only, and completions have no
            text).
        max_model_len: context length in tokens; None: the checkpoint's. Rotary scalings that depend
            on a length (``dynamic``, ``longrope``) are those of this one, and ``dynamic`` ones
            reach beyond the checkpoint's.
        kv_cache_memory_bytes: memory of the KV cache; None: enough for ``max_num_seqs`` full
            contexts, but at most a quarter of the memory that weights and workspace leave free on
            CPU, 90 % of it on CUDA. Layers with a sliding window take of it what their windows
            need (`kv_sizing`), the others the rest.
        block_size: tokens of a KV block; None: what suits the device.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: token budget of a step, which long prompts are cut to.
        enable_prefix_caching: reuse the KV blocks of equal prompt beginnings.
        async_scheduling: build step n + 1 while step n runs; None: on a GPU, which would wait
            otherwise, but not on CPU, whose cores the steps need.
        deterministic: what a request gets does not depend on what else runs. False, on CUDA only,
            takes whatever rounds fastest for the number of rows of a step: products of unquantised
            matrices by dot products for up to 8 rows and by cuBLASLt (package ``nvidia-cublas``)
            for more.
        threads: worker threads on CPU; None: the physical cores that the process may use.
        chat_template: replaces the checkpoint's chat template (Jinja source).
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    quantize: str | None = None
    load_format: str = "auto"
    max_model_len: int | None = None
    kv_cache_memory_bytes: int | None = None
    block_size: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    enable_prefix_caching: bool = True
    async_scheduling: bool | None = None
    deterministic: bool = True
    threads: int | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model must be a path as a string, got {self.model!r}")
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                "device must be auto, cpu, cuda, or cuda: and a number such as cuda:0, "
                f"got {self.device!r}"
            )
        _one_of("dtype", self.dtype, _DTYPES)
        _one_of("load_format", self.load_format, _LOAD_FORMATS)
        _one_of("kv_dtype", self.kv_dtype, _KV_DTYPES)
        if self.quantize is not None:
            _one_of("quantize", self.quantize, _QUANTIZATIONS)
        for name in ("enable_prefix_caching", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.async_scheduling, bool | None):
            raise ConfigError(
                f"async_scheduling must be True, False or None, got {self.async_scheduling!r}"
            )
        if not isinstance(self.chat_template, str | None):
            raise ConfigError(f"chat_template must be Jinja source, got {self.chat_template!r}")
        _positive("max_num_seqs", self.max_num_seqs, 4096)
        _positive("max_num_batched_tokens", self.max_num_batched_tokens, 1 << 16)
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None:
                _positive(name, value, most)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): a running sequence decodes one token a step"
            )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _positive(name: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{name} must be an integer from 1 to {most}, got {value!r}")
