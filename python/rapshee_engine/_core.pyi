"""Typed stub of the native extension. The seam between Python and C++.

Symbols in shapes: ``T`` tokens of a step, ``S`` sequences, ``R`` rows whose logits are
wanted, ``M`` the width of the block tables, ``V`` the vocabulary, ``K`` the largest
``num_logprobs`` of the step.

Errors: ``ValueError`` for an argument that is wrong (the message names field, got and
expected), `WeightError` for weight bytes that cannot be used, `DeviceError` for a device
that failed. After a `DeviceError` with ``ModelRunner.alive`` false the runner is dead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__version__: str

class WeightError(RuntimeError):
    """Weight bytes cannot be read or used. ``args`` is ``(message, tensor, file)``."""

class DeviceError(RuntimeError):
    """The device failed, or none fits the request."""

class Rope:
    """One rotary embedding: ``inv_freq`` (f32 [rotated_dim / 2]); cos and sin are multiplied
    by ``attention_factor``."""

    def __init__(self, inv_freq: Sequence[float], attention_factor: float = 1.0) -> None: ...

class LayerConfig:
    """What may differ from layer to layer: the index of its `Rope` and its sliding window in
    tokens (0: the layer sees everything)."""

    def __init__(self, rope: int = 0, window: int = 0) -> None: ...

class ModelConfig:
    """The decoder as data; see ``rapshee_engine.models.config.ModelConfig`` for the fields."""

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_position: int,
        rms_norm_eps: float,
        query_scale: float,
        attn_softcap: float,
        embed_scale: float,
        residual_scale: float,
        logit_scale: float,
        final_softcap: float,
        activation: str,
        tie_embeddings: bool,
        qkv_bias: bool,
        out_bias: bool,
        mlp_bias: bool,
        pre_norm: bool,
        post_norm: bool,
        norm_zero_centered: bool,
        qk_norm: str,
        interleaved_qk: bool,
        ropes: Sequence[Rope],
        layers: Sequence[LayerConfig],
    ) -> None: ...
    @property
    def kv_windows(self) -> list[int]:
        """Layers with one window form a group with KV blocks and block tables of its own. The
        windows of the G groups, in the order in which layers begin them."""

class TensorEntry:
    """Where one tensor's bytes lie. ``dtype``: a key of ``weights.tensor_info.BLOCK_LAYOUTS``;
    ``shape``: outermost first; ``file`` empty: filled with counter-based random numbers."""

    def __init__(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int],
        file: str,
        offset: int,
        nbytes: int,
    ) -> None: ...

class StepOutput:
    """Result of one step, row by row of ``sample_rows``. Arrays are read-only."""

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """[R] drawn token, or the row's target."""
    @property
    def logprobs(self) -> npt.NDArray[np.float32]:
        """[R] log-probability of that token under the unmodified logits."""
    @property
    def ranks(self) -> npt.NDArray[np.int32]:
        """[R] 1-based rank of that token under the unmodified logits; 0 where ``num_logprobs`` is
        0 and there is no target."""
    @property
    def top_ids(self) -> npt.NDArray[np.int32]:
        """[R, K] most likely tokens, best first, ties by id; unused cells -1."""
    @property
    def top_logprobs(self) -> npt.NDArray[np.float32]:
        """[R, K] their log-probabilities; unused cells -inf."""
    @property
    def timing_us(self) -> int:
        """Microseconds that the step ran, from the start of the forward pass."""

class ModelRunner:
    """Weights, KV cache and forward pass of one model on one device.

    One thread calls it. The GIL is released around everything that takes time.
    """

    def __init__(
        self,
        config: ModelConfig,
        entries: Sequence[TensorEntry],
        *,
        device: str = "cpu",
        dtype: str = "auto",
        kv_dtype: str = "auto",
        num_blocks: Sequence[int],  # of each of ModelConfig.kv_windows
        block_size: int,
        max_num_tokens: int,
        max_num_seqs: int,
        threads: int,
        deterministic: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read and repack all weights and allocate the KV cache.

        ``device``: one of `list_devices`. ``dtype``: ``auto`` (bf16 where the checkpoint is BF16 or
        F16, f32 where it is F32 and the device has it, low-bit blocks as they are), or one of
        `device_dtypes`. ``deterministic``: see ``EngineConfig``.
        ``kv_dtype``: ``auto`` (float32 where the matrices are computed in it, else their half
        type), ``bf16``, or ``int8``, CPU only.
        ``progress(bytes_done, bytes_total)`` is called from the constructing thread; an
        exception that it raises stops the load.

        Raises:
            ValueError: an argument out of range, or ``deterministic=False`` on CPU.
            WeightError: a tensor is missing, has the wrong shape or cannot be read.
            DeviceError: no such device, not enough memory, a ``kv_dtype`` that the device does not
                have, or no cuBLASLt for ``deterministic=False``.
        """
    def launch(
        self,
        *,
        token_ids: npt.NDArray[np.int32],  # [T]; < 0: sample of row ~id of the step in flight
        positions: npt.NDArray[np.int32],  # [T]
        slot_mapping: npt.NDArray[np.int64],  # [G, T] block * block_size + offset; -1: not written
        query_start_loc: npt.NDArray[np.int32],  # [S + 1]; one-token sequences first
        seq_lens: npt.NDArray[np.int32],  # [S] tokens visible to attention, this step's included
        block_tables: npt.NDArray[np.int32],  # [G, S, M]; -1: unused, or before the window
        sample_rows: npt.NDArray[np.int32],  # [R] any row of T
        target_ids: npt.NDArray[np.int32],  # [R] -1: draw; >= 0: score this token, draw nothing
        temperature: npt.NDArray[np.float32],  # [R] 0: greedy
        top_k: npt.NDArray[np.int32],  # [R] 0: off
        top_p: npt.NDArray[np.float32],  # [R] in (0, 1]; 1: off
        min_p: npt.NDArray[np.float32],  # [R] in [0, 1]; 0: off
        repetition_penalty: npt.NDArray[np.float32],  # [R] > 0; 1: off
        presence_penalty: npt.NDArray[np.float32],  # [R] 0: off
        frequency_penalty: npt.NDArray[np.float32],  # [R] 0: off
        seed: npt.NDArray[np.uint64],  # [R]
        draw_index: npt.NDArray[np.uint32],  # [R] index of the generated token, never the row
        num_logprobs: npt.NDArray[np.int32],  # [R] 0: none; up to V
        state_slot: npt.NDArray[np.int32],  # [R] -1: the row uses no penalty
        bias_indptr: npt.NDArray[np.int32],  # [R + 1]
        bias_ids: npt.NDArray[np.int32],  # [nnz]
        bias_values: npt.NDArray[np.float32],  # [nnz] added to the logits
        needs_mask: npt.NDArray[np.uint8],  # [R] sampling waits for set_masks
    ) -> int:
        """Check the step, copy it and start it; returns its ticket. At most two tickets are
        outstanding. Nothing is cast: a wrong dtype, shape or stride is a ``ValueError``, as is
        any id, slot or table entry out of range, and then nothing was started."""
    def set_masks(self, ticket: int, masks: npt.NDArray[np.uint32]) -> None:
        """Allowed tokens of the rows with ``needs_mask``, in their order: u32 [n, ceil(V / 32)],
        bit ``t % 32`` of word ``t // 32`` set where token ``t`` is allowed."""
    def collect(self, ticket: int) -> StepOutput:
        """Wait for the oldest outstanding step. Raises what the step raised; the runner is usable
        afterwards unless `alive` is false."""
    def set_state(
        self, slot: int, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int
    ) -> None:
        """Set the sampling state of a slot (0 <= slot < max_num_seqs) to the tokens seen so far.
        Repetition penalty counts all of them, presence and frequency those after the prompt. The
        sampler itself adds each token it draws. Ordered with the steps before and after."""
    def close(self) -> None:
        """Wait for outstanding steps and give all memory back. Idempotent."""
    @property
    def alive(self) -> bool: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> list[int]:
        """KV blocks of each group of layers."""
    @property
    def kv_windows(self) -> list[int]:
        """As `ModelConfig.kv_windows`."""
    @property
    def weights_checksum(self) -> str:
        """Hex digest over names, dtypes, shapes and bytes of all tensors."""
    @property
    def weight_bytes(self) -> int:
        """Bytes that the repacked weights occupy on the device."""
    @property
    def kv_dtype(self) -> str: ...
    @property
    def description(self) -> str:
        """Device and kernels, e.g. ``cpu (avx512)``. Part of the system fingerprint."""

def build_info() -> dict[str, Any]:
    """``version``, ``compiler``, ``build_type``, ``isas`` (usable here), ``isa`` (selected),
    ``cpu`` (model name), ``cpu_features``, and ``cuda``: False if it is not in this build, else a
    dict of ``kind`` (``cuda`` or ``cuda-emu``), ``devices`` (their models) and ``unavailable`` (why
    there are none, or empty)."""

def list_devices() -> list[str]:
    """Devices that a runner can be made on here, e.g. ``["cpu", "cuda:0"]``."""

# The following raise `DeviceError`, which lists the devices, for one that is not there.

def device_dtypes(device: str) -> list[str]:
    """What ``dtype`` may be besides ``auto``: ``bfloat16`` and ``float32`` on CPU."""

def default_block_size(device: str) -> int:
    """Tokens of a KV block that suit the device: 16 on CPU."""

def kv_block_bytes(config: ModelConfig, *, device: str, dtype: str, block_size: int) -> list[int]:
    """Bytes of one KV block of each group of layers, over the group's layers; ``dtype``: one of
    `device_dtypes`, or ``int8`` on CPU."""

def workspace_bytes(
    config: ModelConfig,
    *,
    device: str,
    max_num_tokens: int,
    max_num_seqs: int,
    block_size: int,
    deterministic: bool = True,
) -> int:
    """Bytes that a runner takes besides its weights and KV blocks, where memory is scarce; 0 on
    CPU."""

def available_memory(device: str) -> int:
    """Bytes that could still be allocated on the device (cgroup limits respected)."""

def usable_cores() -> int:
    """Physical cores that this process may use, by affinity and cgroup quota; at least 1."""

def quantize_rows(
    data: npt.NDArray[np.uint8],  # [rows * bytes of a row] in dtype
    dtype: str,
    cols: int,
    *,
    to: str,
    threads: int,
) -> npt.NDArray[np.uint8]:
    """The rows as blocks of ``to``: ``q8_0``, or ``q4_1`` by a search for the least squared error.
    The bytes depend on the numbers alone. Raises `WeightError` for what is not finite."""

# Single operations of the CPU kernels on numpy arrays, for tests and benchmarks. `isa`: one of
# ``build_info()["isas"]``, empty for the one in use.

class PackedMatrix:
    """A weight matrix [rows, cols] in the panels that the kernels read."""

    def __init__(
        self,
        data: npt.NDArray[np.uint8],  # [nbytes] row-major blocks of dtype
        dtype: str,
        rows: int,
        cols: int,
        *,
        compute: str = "auto",
    ) -> None: ...
    @property
    def nbytes(self) -> int:
        """Bytes of the panels."""
    def row(self, index: int) -> npt.NDArray[np.float32]:
        """[cols] one row, dequantised, as an embedding gather reads it."""
    def multiply(
        self,
        x: npt.NDArray[np.float32],  # [n, cols]
        *,
        isa: str = "",
        float_acts: bool = False,
        fine: bool = False,
        threads: int = 1,
    ) -> npt.NDArray[np.float32]:
        """[n, rows] ``x @ matrix.T``. ``float_acts``: activations stay float32 instead of taking
        the matrix's form (int8 for low-bit, bf16 for bf16). ``fine``: int8 activations have a scale
        per 16 elements instead of 32."""

def op_rms_norm(
    x: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], eps: float, *, isa: str = ""
) -> npt.NDArray[np.float32]:
    """RMSNorm of the rows of x [n, d]."""

def op_silu_mul(
    gate: npt.NDArray[np.float32], up: npt.NDArray[np.float32], *, isa: str = ""
) -> npt.NDArray[np.float32]:
    """silu(gate) * up of two vectors."""

def op_gelu_mul(
    gate: npt.NDArray[np.float32], up: npt.NDArray[np.float32], *, isa: str = ""
) -> npt.NDArray[np.float32]:
    """gelu(gate) * up of two vectors, GELU by its tanh approximation."""

def op_add_normed(
    x: npt.NDArray[np.float32],  # [n, d]
    y: npt.NDArray[np.float32],  # [n, d]
    weight: npt.NDArray[np.float32],  # [d]
    eps: float,
    factor: float,
    *,
    isa: str = "",
) -> npt.NDArray[np.float32]:
    """x plus ``factor`` times the RMSNorm of the rows of y."""

def op_soft_cap(
    x: npt.NDArray[np.float32], scale: float, cap: float, *, isa: str = ""
) -> npt.NDArray[np.float32]:
    """``cap * tanh(scale * x / cap)`` of a vector; ``cap`` 0: ``scale * x``."""

def op_rope(
    heads: npt.NDArray[np.float32],
    cos: npt.NDArray[np.float32],
    sin: npt.NDArray[np.float32],
    *,
    isa: str = "",
) -> npt.NDArray[np.float32]:
    """heads [n, head_dim], rotated in halves by angles whose cos and sin are [half]."""

class PagedCache:
    """Keys and values of one KV head in a paged cache that otherwise holds NaN."""

    def __init__(
        self,
        k: npt.NDArray[np.float32],  # [L, head_dim]
        v: npt.NDArray[np.float32],  # [L, head_dim]
        block_table: npt.NDArray[np.int32],  # a permutation of the blocks that hold the L keys
        *,
        block_size: int = 16,
        dtype: str = "f32",
        isa: str = "",
    ) -> None:
        """``dtype``: f32, bf16 or int8."""
    def attend(
        self,
        q: npt.NDArray[np.float32],  # [T, group, head_dim]
        positions: npt.NDArray[np.int32],  # [T] of the queries
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> npt.NDArray[np.float32]:
        """[T, group, head_dim] causal attention of the query heads that share the KV head."""

def measure_read(nbytes: int, *, threads: int = 1, isa: str = "") -> float:
    """Bytes a second that the threads read together from a working set of ``nbytes``."""

def measure_peak(kind: str, *, threads: int = 1, isa: str = "") -> float:
    """Multiplications and additions a second, operands in registers; ``kind``: ``f32`` (fused
    multiply-add), ``bf16`` or ``int8`` (dot products)."""

def sample(
    logits: npt.NDArray[np.float32],  # [R, V]
    *,
    masks: npt.NDArray[np.uint32] | None = None,
    states: Sequence[tuple[npt.NDArray[np.int32], int]] = (),
    isa: str = "",
    target_ids: npt.NDArray[np.int32],
    temperature: npt.NDArray[np.float32],
    top_k: npt.NDArray[np.int32],
    top_p: npt.NDArray[np.float32],
    min_p: npt.NDArray[np.float32],
    repetition_penalty: npt.NDArray[np.float32],
    presence_penalty: npt.NDArray[np.float32],
    frequency_penalty: npt.NDArray[np.float32],
    seed: npt.NDArray[np.uint64],
    draw_index: npt.NDArray[np.uint32],
    num_logprobs: npt.NDArray[np.int32],
    state_slot: npt.NDArray[np.int32],
    bias_indptr: npt.NDArray[np.int32],
    bias_ids: npt.NDArray[np.int32],
    bias_values: npt.NDArray[np.float32],
    needs_mask: npt.NDArray[np.uint8],
) -> tuple[
    npt.NDArray[np.int32],
    npt.NDArray[np.float32],
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
    npt.NDArray[np.float32],
]:
    """Sample the rows in order; arrays as in `ModelRunner.launch`, results as in `StepOutput`.
    ``states[i]`` (token_ids, num_prompt_tokens) fills state slot i."""
