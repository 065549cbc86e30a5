"""Steps for the native runner, built by hand: sequences over blocks of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rapshee_engine import _core
from rapshee_engine.models.config import ModelConfig
from rapshee_engine.weights.loader import load_checkpoint

__all__ = ["BLOCK_SIZE", "Chunk", "StepArrays", "make_runner", "make_step", "native_config"]

BLOCK_SIZE = 16
_NO_TABLE = ("architecture", "ropes", "layers")

StepArrays = dict[str, npt.NDArray[Any]]


def native_config(config: ModelConfig, windows: Sequence[int] | None = None) -> _core.ModelConfig:
    """``windows``: of the layers, instead of the checkpoint's."""
    if windows is None:
        windows = [layer.window for layer in config.layers]
    plain = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _NO_TABLE}
    return _core.ModelConfig(
        **plain,
        ropes=[_core.Rope(rope.inv_freq, rope.attention_factor) for rope in config.ropes],
        layers=[
            _core.LayerConfig(layer.rope, window)
            for layer, window in zip(config.layers, windows, strict=True)
        ],
    )


def make_runner(
    path: Path,
    load_format: str = "auto",
    windows: Sequence[int] | None = None,
    context_length: int | None = None,
    **options: Any,
) -> _core.ModelRunner:
    """The native runner of a checkpoint; ``windows`` as for `native_config`, ``options`` those of
    `_core.ModelRunner`, of which ``num_blocks`` may be one number for all groups of layers."""
    checkpoint = load_checkpoint(path, load_format, context_length=context_length)
    entries = [
        _core.TensorEntry(e.name, e.dtype, e.shape, e.file, e.offset, e.nbytes)
        for e in checkpoint.entries
    ]
    sizes = {"num_blocks": 64, "max_num_tokens": 512, "max_num_seqs": 32, "threads": 1}
    config, arguments = native_config(checkpoint.config, windows), {**sizes, **options}
    if isinstance(arguments["num_blocks"], int):
        arguments["num_blocks"] = [arguments["num_blocks"]] * len(config.kv_windows)
    return _core.ModelRunner(config, entries, block_size=BLOCK_SIZE, **arguments)


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence in a step.

    Attributes:
        token_ids: input ids; negative: samples of the step before.
        start: position of the first.
        blocks: physical blocks of the sequence.
        dropped: of each group of layers, how many of the first blocks are gone.
        targets: a row for each of the first tokens that scores this id; None: one row draws after
            the last.
    """

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    targets: Sequence[int] | None = None
    dropped: Sequence[int] = (0,)

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def slots(self) -> list[int]:
        positions = range(self.start, self.end)
        return [self.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]

    def table(self, group: int, width: int) -> list[int]:
        dropped = self.dropped[group]
        return [*[-1] * dropped, *self.blocks[dropped:], *[-1] * (width - len(self.blocks))]


def make_step(chunks: Sequence[Chunk], *, num_logprobs: int = 0, **changes: Any) -> StepArrays:
    """The arguments of ``launch``: greedy rows, in the order of ``chunks`` (those of one token
    come first), with the same blocks in every group of layers. ``changes`` replace arrays."""
    width = max(len(chunk.blocks) for chunk in chunks)
    groups = range(len(chunks[0].dropped))
    lens = [len(chunk.token_ids) for chunk in chunks]
    starts = np.cumsum([0, *lens])
    sample_rows: list[int] = []
    target_ids: list[int] = []
    for begin, end, chunk in zip(starts, starts[1:], chunks, strict=False):
        if chunk.targets is None:
            sample_rows.append(end - 1)
            target_ids.append(-1)
        else:
            sample_rows += range(begin, begin + len(chunk.targets))
            target_ids += chunk.targets
    rows = len(sample_rows)
    step = {
        "token_ids": np.array([t for c in chunks for t in c.token_ids], np.int32),
        "positions": np.concatenate([np.arange(c.start, c.end) for c in chunks]).astype(np.int32),
        "slot_mapping": np.array(
            [[slot for c in chunks for slot in c.slots] for _ in groups], np.int64
        ),
        "query_start_loc": starts.astype(np.int32),
        "seq_lens": np.array([chunk.end for chunk in chunks], np.int32),
        "block_tables": np.array([[c.table(g, width) for c in chunks] for g in groups], np.int32),
        "sample_rows": np.array(sample_rows, np.int32),
        "target_ids": np.array(target_ids, np.int32),
        **sampling_columns(rows, num_logprobs),
        "bias_indptr": np.zeros(rows + 1, np.int32),
        "bias_ids": np.zeros(0, np.int32),
        "bias_values": np.zeros(0, np.float32),
    }
    return step | changes


def sampling_columns(rows: int, num_logprobs: int) -> StepArrays:
    return {
        "temperature": np.zeros(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "repetition_penalty": np.ones(rows, np.float32),
        "presence_penalty": np.zeros(rows, np.float32),
        "frequency_penalty": np.zeros(rows, np.float32),
        "seed": np.zeros(rows, np.uint64),
        "draw_index": np.zeros(rows, np.uint32),
        "num_logprobs": np.full(rows, num_logprobs, np.int32),
        "state_slot": np.full(rows, -1, np.int32),
        "needs_mask": np.zeros(rows, np.uint8),
    }
