"""What operations cost, in bytes and arithmetic, and what this machine can do of both.

The costs count what an operation cannot avoid: each input read once, each output written once.
The limits of a CPU are measured by the native library in the same run as the benchmark, those of a
GPU by ``bench/cuda/measure_ceilings.py``. Costs whose names begin with ``gpu_`` are those of the
CUDA kernels, where activations and caches are halves and partial sums floats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from rapshee_engine import _core
from rapshee_engine.models.config import ModelConfig
from rapshee_engine.weights.loader import Checkpoint

__all__ = [
    "Cost",
    "GpuLimits",
    "Limits",
    "decode_cost",
    "gpu_decode_attention",
    "gpu_embed",
    "gpu_gated_activation",
    "gpu_linear",
    "gpu_prefill_attention",
    "gpu_rms_norm",
    "gpu_rope_kv_write",
    "gpu_sampling",
    "gpu_scale_logits",
    "linear",
    "model_step",
    "paged_attention",
    "prompt_cost",
    "rms_norm",
    "rope",
    "sampling",
    "silu_mul",
    "workload_seconds",
]

MEMORY_BYTES = 512 << 20  # working set far above every cache
CACHE_BYTES = 16 << 20  # one that a last-level cache holds
_F32 = 4
_HALF = 2
# Bytes of 32 weights in a packed panel: codes, scales and minimums.
_BLOCK_BYTES = {
    "f32": 128, "f16": 64, "bf16": 64, "q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34,
    "q2_k": 12.5, "q3_k": 14.25, "q4_k": 18.5, "q5_k": 22.5, "q6_k": 26.25,
}  # fmt: skip
# What a matrix of each dtype multiplies with; low-bit ones with int8.
_ARITHMETIC = {"f32": "f32", "f16": "bf16", "bf16": "bf16"}


@dataclass(frozen=True, slots=True)
class Cost:
    """Unavoidable work.

    Attributes:
        nbytes: read and written.
        operations: multiplications and additions, by arithmetic: ``f32``, ``bf16``, ``int8``.
    """

    nbytes: float
    operations: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        kinds = {*self.operations, *other.operations}
        operations = {
            kind: self.operations.get(kind, 0) + other.operations.get(kind, 0) for kind in kinds
        }
        return Cost(self.nbytes + other.nbytes, operations)

    def __mul__(self, times: float) -> Cost:
        scaled = {kind: count * times for kind, count in self.operations.items()}
        return Cost(self.nbytes * times, scaled)

    @property
    def total_operations(self) -> float:
        return sum(self.operations.values())


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do with some threads and an instruction set.

    Attributes:
        memory: bytes a second read from memory.
        cache: bytes a second read from a working set of 16 MB.
        peak: operations a second, by arithmetic.
    """

    threads: int
    isa: str
    memory: float
    cache: float
    peak: Mapping[str, float]

    @classmethod
    def measure(cls, threads: int, isa: str = "") -> Limits:
        """Takes about two seconds."""
        return cls(
            threads=threads,
            isa=isa or str(_core.build_info()["isa"]),
            memory=_core.measure_read(MEMORY_BYTES, threads=threads, isa=isa),
            cache=_core.measure_read(CACHE_BYTES, threads=threads, isa=isa),
            peak={
                kind: _core.measure_peak(kind, threads=threads, isa=isa)
                for kind in ("f32", "bf16", "int8")
            },
        )

    def seconds(self, cost: Cost, *, cached: bool = False) -> tuple[float, str]:
        """The least time that ``cost`` takes, and what bounds it: ``memory``, ``cache`` or
        ``arithmetic``. ``cached``: its bytes lie in a cache already."""
        moving = cost.nbytes / (self.cache if cached else self.memory)
        # Different arithmetic runs on the same units, one after the other.
        computing = sum(count / self.peak[kind] for kind, count in cost.operations.items())
        if computing > moving:
            return computing, "arithmetic"
        return moving, "cache" if cached else "memory"

    def __str__(self) -> str:
        peaks = ", ".join(f"{kind} {rate / 1e9:.0f} Gop/s" for kind, rate in self.peak.items())
        return (
            f"limits ({self.isa}, {self.threads} thread{'s' * (self.threads > 1)}): "
            f"memory {self.memory / 1e9:.1f} GB/s, cache {self.cache / 1e9:.1f} GB/s, {peaks}"
        )


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """What a GPU did in the same run, whatever the datasheet says.

    Attributes:
        memory: bytes a second of a copy within the device, read and written.
        read: bytes a second of a kernel that only reads; 0: not measured.
        matrix: operations a second of torch's product of two bf16 matrices [8192, 8192]; 0: not
            measured.
        launch: seconds from event to event around an empty kernel, the least that a timed kernel
            can take; 0: not counted.
    """

    memory: float
    read: float = 0.0
    matrix: float = 0.0
    launch: float = 0.0

    @classmethod
    def load(cls, path: Path) -> GpuLimits:
        """From the lines of ``measure_ceilings.py``.

        Raises:
            ValueError: the bandwidth of a copy is not among them.
        """
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        values = {line["ceiling"]: line["value"] for line in lines if "ceiling" in line}
        if not values.get("memory"):
            raise ValueError(f"{path}: no line with the ceiling 'memory'")
        return cls(**{name: float(values.get(name) or 0.0) for name in cls.__slots__})

    def seconds(self, cost: Cost) -> tuple[float, str]:
        """The least time that ``cost`` takes, and what bounds it: ``memory``, ``arithmetic`` or
        ``launch``. All arithmetic counts as that of matrices."""
        limits = {
            "memory": cost.nbytes / self.memory,
            "arithmetic": cost.total_operations / self.matrix if self.matrix else 0.0,
            "launch": self.launch,
        }
        bound = max(limits, key=lambda name: limits[name])
        return limits[bound], bound

    def __str__(self) -> str:
        return (
            f"ceilings: copy {self.memory / 1e9:.0f} GB/s, read {self.read / 1e9:.0f} GB/s, "
            f"matrix product {self.matrix / 1e12:.0f} TFLOP/s, empty kernel "
            f"{self.launch * 1e6:.1f} us"
        )


def matrix_bytes(dtype: str, rows: int, cols: int) -> float:
    return rows * cols / 32 * _BLOCK_BYTES[dtype]


def linear(n: int, rows: int, cols: int, dtype: str) -> Cost:
    """n rows of activations times a matrix [rows, cols] of ``dtype``."""
    nbytes = matrix_bytes(dtype, rows, cols) + n * (rows + cols) * _F32
    return Cost(nbytes, {_ARITHMETIC.get(dtype, "int8"): 2.0 * n * rows * cols})


def paged_attention(
    pairs: float, keys: float, group: int, head_dim: int, tokens: int, dtype: str
) -> Cost:
    """Attention of one KV head.

    Args:
        pairs: (query token, visible key) pairs.
        keys: keys and values that are read.
        dtype: of the cache, ``f32``, ``bf16`` or ``int8``, whose codes are multiplied as floats.
    """
    nbytes = 2 * keys * _kv_row_bytes(head_dim, dtype) + 2 * tokens * group * head_dim * _F32
    arithmetic = "f32" if dtype == "int8" else dtype
    return Cost(nbytes, {arithmetic: 4.0 * pairs * group * head_dim})


def rms_norm(n: int, size: int) -> Cost:
    """Square, sum, scale and weight of each element."""
    return Cost((2 * n + 1) * size * _F32, {"f32": 4.0 * n * size})


def rope(heads: int, head_dim: int) -> Cost:
    """Three operations an element."""
    return Cost((2 * heads + 1) * head_dim * _F32, {"f32": 3.0 * heads * head_dim})


def silu_mul(size: int) -> Cost:
    """About 20 operations an element, most of them exp."""
    return Cost(3 * size * _F32, {"f32": 20.0 * size})


def sampling(rows: int, vocab_size: int) -> Cost:
    """The logits, once."""
    return Cost(rows * vocab_size * _F32)


def kv_dtype(checkpoint: Checkpoint) -> str:
    """Of the KV cache, with ``dtype="auto"``."""
    matrices = (entry.dtype for entry in checkpoint.entries if len(entry.shape) > 1)
    return "f32" if all(dtype == "f32" for dtype in matrices) else "bf16"


def kv_token_bytes(config: ModelConfig, dtype: str) -> float:
    """Bytes of one token's keys and values, over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * _kv_row_bytes(config.head_dim, dtype)


def _kv_row_bytes(head_dim: int, dtype: str) -> float:
    """Bytes of one token's keys, or values, of one KV head; int8 has a scale."""
    return head_dim + _F32 if dtype == "int8" else head_dim * _BLOCK_BYTES[dtype] / 32


def model_step(checkpoint: Checkpoint, *, tokens: int, sampled: int, start: float) -> Cost:
    """One step of a model: the weights once, keys and values, the arithmetic of all tokens.

    Args:
        tokens: query tokens of each sequence. One sequence, unless it is 1.
        sampled: rows whose logits are computed; with one query token, the sequences.
        start: tokens that each sequence has in the cache already, or their mean.
    """
    config = checkpoint.config
    sequences = sampled if tokens == 1 else 1
    rows = sequences * tokens
    cost = Cost(0.0)
    for entry in checkpoint.entries:
        if len(entry.shape) < 2:
            continue
        out_rows, cols = entry.shape[0], prod(entry.shape[1:])
        is_embedding = entry.name == "embed.weight"
        is_head = entry.name == "head.weight" or (is_embedding and config.tie_embeddings)
        if is_embedding and not is_head:
            continue
        count = sampled if is_head else rows
        operations = {_ARITHMETIC.get(entry.dtype, "int8"): 2.0 * count * out_rows * cols}
        cost += Cost(matrix_bytes(entry.dtype, out_rows, cols), operations)
    dtype = kv_dtype(checkpoint)
    pairs = tokens * start + tokens * (tokens + 1) / 2
    attention = 4.0 * pairs * config.num_heads * config.head_dim * config.num_layers * sequences
    keys = sequences * (start + tokens)
    return cost + Cost(keys * kv_token_bytes(config, dtype), {dtype: attention})


def decode_cost(checkpoint: Checkpoint, rows: int, context: float) -> Cost:
    """A step that decodes one token of each of ``rows`` sequences, the mean of whose lengths is
    ``context``, the new tokens included."""
    return model_step(checkpoint, tokens=1, sampled=rows, start=context - 1)


def prompt_cost(checkpoint: Checkpoint, count: int, budget: int) -> Cost:
    """A prompt alone, in steps of ``budget`` tokens, the last of which samples."""
    cost = Cost(0.0)
    for start in range(0, count, budget):
        tokens = min(budget, count - start)
        is_last = start + budget >= count
        cost += model_step(checkpoint, tokens=tokens, sampled=int(is_last), start=start)
    return cost


def workload_seconds(
    checkpoint: Checkpoint,
    limits: GpuLimits | Limits,
    prompts: Sequence[int],
    outputs: Sequence[int],
) -> float:
    """The least time of requests that all begin at once and all fit: each prompt at the speed of
    arithmetic, then one step for each token, of the requests that still run."""
    seconds = sum(
        limits.seconds(Cost(0.0, prompt_cost(checkpoint, count, count).operations))[0]
        for count in prompts
    )
    for token in range(1, max(outputs)):
        lengths = [
            prompt + token
            for prompt, output in zip(prompts, outputs, strict=True)
            if output > token
        ]
        cost = decode_cost(checkpoint, len(lengths), sum(lengths) / len(lengths))
        seconds += limits.seconds(cost)[0]
    return seconds


# Where the layout on a GPU (csrc/backend/cuda/kernels/launchers.h) differs from the panels.
_GPU_BLOCK_BYTES = {
    "q5_0": 24, "q5_1": 24, "q2_k": 16, "q3_k": 16, "q4_k": 20, "q5_k": 24, "q6_k": 28,
}  # fmt: skip


def gpu_matrix_bytes(dtype: str, rows: int, cols: int) -> float:
    return rows * cols / 32 * {**_BLOCK_BYTES, **_GPU_BLOCK_BYTES}[dtype]


def gpu_linear(n: int, rows: int, cols: int, dtype: str) -> Cost:
    """n rows of halves times a matrix [rows, cols] of ``dtype``, to floats."""
    nbytes = gpu_matrix_bytes(dtype, rows, cols) + n * (cols * _HALF + rows * _F32)
    return Cost(nbytes, {"bf16": 2.0 * n * rows * cols})


def gpu_decode_attention(seqs: int, context: int, heads: int, kv_heads: int, head_dim: int) -> Cost:
    """One query of each of ``seqs`` sequences of ``context`` keys."""
    keys_and_values = 2 * seqs * context * kv_heads * head_dim * _HALF
    queries_and_outputs = 2 * seqs * heads * head_dim * _HALF
    operations = 4.0 * seqs * context * heads * head_dim
    return Cost(keys_and_values + queries_and_outputs, {"bf16": operations})


def gpu_prefill_attention(tokens: int, heads: int, kv_heads: int, head_dim: int) -> Cost:
    """A whole prompt; each token sees itself and those before it."""
    nbytes = 2 * tokens * (heads + kv_heads) * head_dim * _HALF
    return Cost(nbytes, {"bf16": 4.0 * tokens * (tokens + 1) / 2 * heads * head_dim})


def gpu_rms_norm(rows: int, hidden: int, splits: int, *, norms: int = 1) -> Cost:
    """The residual stream and ``splits`` partial sums read; the stream and halves written."""
    return Cost(rows * hidden * ((2 + splits) * _F32 + _HALF) + norms * hidden * _F32)


def gpu_rope_kv_write(rows: int, heads: int, kv_heads: int, head_dim: int, splits: int) -> Cost:
    """``splits`` partial sums of q, k and v to halves; a cosine and a sine for each pair."""
    elements = rows * (heads + 2 * kv_heads) * head_dim
    return Cost(elements * (splits * _F32 + _HALF) + rows * head_dim * _F32)


def gpu_embed(rows: int, hidden: int, dtype: str) -> Cost:
    return Cost(gpu_matrix_bytes(dtype, rows, hidden) + rows * hidden * _F32)


def gpu_gated_activation(rows: int, size: int) -> Cost:
    """Two floats read and one half written for each output."""
    return Cost(rows * size * (2 * _F32 + _HALF))


def gpu_scale_logits(rows: int, vocab_size: int) -> Cost:
    return Cost(2 * rows * vocab_size * _F32)


def gpu_sampling(rows: int, vocab_size: int, *, penalties: bool = False) -> Cost:
    """The logits once, and with penalties the counts."""
    return Cost(rows * vocab_size * _F32 * (1 + penalties))
