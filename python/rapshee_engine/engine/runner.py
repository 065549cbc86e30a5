"""The door to the native model runner: one model on one device."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from rapshee_engine import _core
from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.batch_builder import StepInput
from rapshee_engine.engine.kv_cache import KVGroup
from rapshee_engine.engine.kv_sizing import share_memory, wanted_blocks
from rapshee_engine.errors import (
    ConfigError,
    EngineDeadError,
    RapsheeError,
    StepError,
    WeightFileError,
)
from rapshee_engine.models.config import ModelConfig
from rapshee_engine.weights.loader import Checkpoint

__all__ = ["MemoryPlan", "Runner", "StepResult", "StepRunner", "build_info", "memory_plan"]


def build_info() -> dict[str, Any]:
    """What this build and this machine offer: ``_core.build_info()`` and ``devices``.

    Raises:
        ConfigError: ``RAPSHEE_CPU_ISA`` asks for what this processor cannot run.
    """
    try:
        return {**_core.build_info(), "devices": _core.list_devices()}
    except _core.DeviceError as error:
        raise ConfigError(str(error)) from error


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a model would take, in bytes.

    Attributes:
        weights: as stored; repacked ones differ little.
        contexts: (tokens, KV cache of one sequence that long, of ``max_num_seqs`` of them).
    """

    device: str
    available: int
    weights: int
    kv_dtype: str
    block_size: int
    contexts: tuple[tuple[int, int, int], ...]


def memory_plan(
    config: EngineConfig, checkpoint: Checkpoint, contexts: Sequence[int]
) -> MemoryPlan:
    """What the checkpoint would take with these options, at each context length in tokens.

    Raises:
        ConfigError: an option does not fit the device, or there is no such device.
    """
    with _loading(checkpoint):
        device = _resolve_device(config.device)
        _check_dtype(config.dtype, device)
        block_size = config.block_size or _core.default_block_size(device)
        native_config = _native_config(checkpoint.config)
        kv_dtype = _kv_dtype(config, checkpoint, device)
        block_bytes = _core.kv_block_bytes(
            native_config, device=device, dtype=kv_dtype, block_size=block_size
        )

        def kv_bytes(tokens: int, num_seqs: int) -> int:
            asked = replace(config, max_num_seqs=num_seqs)
            windows = native_config.kv_windows
            blocks = [
                wanted_blocks(asked, window, max_model_len=tokens, block_size=block_size)
                for window in windows
            ]
            return sum(n * size for n, size in zip(blocks, block_bytes, strict=True))

        return MemoryPlan(
            device=device,
            available=_core.available_memory(device),
            weights=checkpoint.weight_bytes,
            kv_dtype=kv_dtype,
            block_size=block_size,
            contexts=tuple((n, kv_bytes(n, 1), kv_bytes(n, config.max_num_seqs)) for n in contexts),
        )


class StepResult(Protocol):
    """Result of a step, as in ``_core.StepOutput``."""

    @property
    def token_ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def logprobs(self) -> npt.NDArray[np.float32]: ...
    @property
    def ranks(self) -> npt.NDArray[np.int32]: ...
    @property
    def top_ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def top_logprobs(self) -> npt.NDArray[np.float32]: ...


class StepRunner(Protocol):
    """What the engine needs of a runner.

    Tickets are collected in the order of launch; at most two are outstanding.

    Raises (any method):
        StepError: this step failed, the runner goes on.
        EngineDeadError: the runner is dead.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def kv_groups(self) -> tuple[KVGroup, ...]: ...
    @property
    def is_asynchronous(self) -> bool:
        """Whether a step leaves the host's cores free."""
        ...

    @property
    def identity(self) -> str:
        """Everything that tells this build, device and these weights from others."""
        ...

    def launch(self, step_input: StepInput) -> int:
        """Start a step; its ticket. The arrays may be reused at once."""
        ...

    def set_masks(self, ticket: int, masks: npt.NDArray[np.uint32]) -> None: ...
    def collect(self, ticket: int) -> StepResult: ...
    def set_state(
        self, slot: int, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int
    ) -> None: ...
    def close(self) -> None: ...


class Runner:
    """`StepRunner` on ``_core.ModelRunner``."""

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint) -> None:
        """Read the weights and allocate the KV cache.

        Raises:
            ConfigError: an option does not fit the machine, or the device cannot be used or has not
                enough memory; the message says what to change.
            WeightFileError: a tensor is missing, has the wrong shape or cannot be read.
        """
        with _loading(checkpoint), _progress_bar(checkpoint.weight_bytes) as bar:
            device = _resolve_device(config.device)
            _check_dtype(config.dtype, device)
            block_size = config.block_size or _core.default_block_size(device)
            native_config = _native_config(checkpoint.config)
            num_blocks = _num_blocks(config, checkpoint, native_config, device, block_size)
            entries = [
                _core.TensorEntry(t.name, t.dtype, t.shape, t.file, t.offset, t.nbytes)
                for t in checkpoint.entries
            ]
            self._is_asynchronous = device != "cpu"
            # Rotary frequencies may follow from options, and nothing else tells of them.
            text = repr(checkpoint.config).encode()
            self._config_digest = hashlib.blake2b(text, digest_size=16).hexdigest()
            self._runner = _core.ModelRunner(
                native_config,
                entries,
                device=device,
                dtype=config.dtype,
                kv_dtype=config.kv_dtype,
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_tokens=config.max_num_batched_tokens,
                max_num_seqs=config.max_num_seqs,
                threads=config.threads or _core.usable_cores(),
                deterministic=config.deterministic,
                progress=lambda done, total: _advance(bar, done, total),
            )

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def block_size(self) -> int:
        return self._runner.block_size

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        pairs = zip(self._runner.num_blocks, self._runner.kv_windows, strict=True)
        return tuple(KVGroup(num_blocks, window) for num_blocks, window in pairs)

    @property
    def is_asynchronous(self) -> bool:
        return self._is_asynchronous

    @property
    def weight_bytes(self) -> int:
        """Bytes that the repacked weights occupy."""
        return self._runner.weight_bytes

    @property
    def description(self) -> str:
        return self._runner.description

    @property
    def identity(self) -> str:
        build = _core.build_info()
        runner = self._runner
        return "|".join(
            (
                str(build["version"]),
                str(build["compiler"]),
                runner.description,
                runner.kv_dtype,
                runner.weights_checksum,
                self._config_digest,
            )
        )

    def launch(self, step_input: StepInput) -> int:
        with self._stepping():
            return self._runner.launch(**step_input.as_arguments())

    def set_masks(self, ticket: int, masks: npt.NDArray[np.uint32]) -> None:
        with self._stepping():
            self._runner.set_masks(ticket, masks)

    def collect(self, ticket: int) -> StepResult:
        with self._stepping():
            return self._runner.collect(ticket)

    def set_state(
        self, slot: int, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int
    ) -> None:
        with self._stepping():
            self._runner.set_state(slot, token_ids, num_prompt_tokens)

    def close(self) -> None:
        """Wait for outstanding steps and give all memory back. Idempotent."""
        self._runner.close()

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._runner.alive:
                raise EngineDeadError(f"the device failed: {error}") from error
            raise StepError(f"a step failed: {error}") from error


def _resolve_device(device: str) -> str:
    if device != "auto":
        return device
    gpus = (name for name in _core.list_devices() if name.startswith("cuda:"))
    return next(gpus, "cpu")


def _check_dtype(dtype: str, device: str) -> None:
    allowed = ["auto", *_core.device_dtypes(device)]
    if dtype not in allowed:
        raise ConfigError(f"{device} has no dtype {dtype!r}; available: {', '.join(allowed)}")


def _native_config(config: ModelConfig) -> _core.ModelConfig:
    return _core.ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position=config.max_position,
        rms_norm_eps=config.rms_norm_eps,
        query_scale=config.query_scale,
        attn_softcap=config.attn_softcap,
        embed_scale=config.embed_scale,
        residual_scale=config.residual_scale,
        logit_scale=config.logit_scale,
        final_softcap=config.final_softcap,
        activation=config.activation,
        tie_embeddings=config.tie_embeddings,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        mlp_bias=config.mlp_bias,
        pre_norm=config.pre_norm,
        post_norm=config.post_norm,
        norm_zero_centered=config.norm_zero_centered,
        qk_norm=config.qk_norm,
        interleaved_qk=config.interleaved_qk,
        ropes=[_core.Rope(rope.inv_freq, rope.attention_factor) for rope in config.ropes],
        layers=[_core.LayerConfig(layer.rope, layer.window) for layer in config.layers],
    )


def _num_blocks(
    config: EngineConfig,
    checkpoint: Checkpoint,
    native_config: _core.ModelConfig,
    device: str,
    block_size: int,
) -> list[int]:
    """Blocks of each group of layers, by the rule of ``EngineConfig.kv_cache_memory_bytes``."""
    block_bytes = _core.kv_block_bytes(
        native_config,
        device=device,
        dtype=_kv_dtype(config, checkpoint, device),
        block_size=block_size,
    )
    workspace = _core.workspace_bytes(
        native_config,
        device=device,
        max_num_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        block_size=block_size,
        deterministic=config.deterministic,
    )
    free = max(0, _core.available_memory(device) - checkpoint.weight_bytes - workspace)
    max_model_len = config.max_model_len or checkpoint.config.max_position
    wanted = [
        wanted_blocks(config, window, max_model_len=max_model_len, block_size=block_size)
        for window in native_config.kv_windows
    ]
    memory = config.kv_cache_memory_bytes
    if memory is None:
        # Memory of a GPU is this process's own; that of the host is everybody's.
        memory = free // 4 if device == "cpu" else free // 10 * 9
    elif memory > free:
        raise ConfigError(
            f"kv_cache_memory_bytes ({memory}) is more than the {free} bytes that the weights "
            f"of {checkpoint.path!r} leave free on {device}"
        )
    else:  # all of it, also beyond what is wanted: the prefix cache then remembers more
        wanted[wanted.index(max(wanted))] = memory
    num_blocks = share_memory(memory, block_bytes, wanted)
    if min(num_blocks) < 1:
        raise ConfigError(
            f"the KV cache has {memory} bytes, but one block of {block_size} tokens takes "
            f"{sum(block_bytes)}; set kv_cache_memory_bytes to at least that, or free memory"
        )
    return num_blocks


def _kv_dtype(config: EngineConfig, checkpoint: Checkpoint, device: str) -> str:
    if config.kv_dtype != "auto":
        return {"bf16": "bfloat16", "int8": "int8"}[config.kv_dtype]
    if config.dtype != "auto":
        return config.dtype
    matrices = (entry.dtype for entry in checkpoint.entries if len(entry.shape) > 1)
    is_float32 = all(name == "f32" for name in matrices)
    return "float32" if is_float32 and "float32" in _core.device_dtypes(device) else "bfloat16"


@contextmanager
def _loading(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what the native loader raises into the package's errors."""
    try:
        yield
    except RapsheeError:
        raise
    except _core.WeightError as error:
        message, tensor, file = (*error.args, None, None)[:3]
        raise WeightFileError(file or checkpoint.path, message, tensor=tensor or None) from error
    except (_core.DeviceError, ValueError) as error:
        raise ConfigError(f"cannot load {checkpoint.path!r}: {error}") from error


@contextmanager
def _progress_bar(total: int) -> Iterator[tqdm[Any]]:
    """Bytes read, if somebody looks."""
    bar: tqdm[Any] = tqdm(
        total=total,
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        yield bar


def _advance(bar: tqdm[Any], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
