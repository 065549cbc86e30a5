"""Whole steps of a model: prefill and decode, in tokens a second, beside the machine's limits.

    python bench/bench_step.py MODEL [--threads N] [--json FILE]

MODEL is a GGUF file or a Hugging Face folder. Steps go straight to the runner, so this is the
forward pass with greedy sampling, without scheduler, tokenizer or server.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness import Report, add_options, measure
from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.batch_builder import StepInput
from rapshee_engine.engine.runner import Runner
from rapshee_engine.weights.loader import Checkpoint, load_checkpoint
from roofline import Cost, Limits, kv_dtype, kv_token_bytes, model_step

CHUNK = 512  # prompt tokens of a step, as the engine's default
CONTEXT = 128  # tokens before those that are decoded
PROMPTS = (512, 4096)
STREAMS = (1, 8, 32)
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """``count`` tokens of the sequence in ``slot``, from position ``start`` on."""

    slot: int
    start: int
    count: int


class Steps:
    """Builds and runs steps; each slot has ``blocks_per_slot`` KV blocks of its own."""

    def __init__(self, runner: Runner, blocks_per_slot: int) -> None:
        self._runner = runner
        self._blocks_per_slot = blocks_per_slot

    def run(self, step: StepInput) -> None:
        self._runner.collect(self._runner.launch(step))

    def build(self, chunks: Sequence[Chunk], *, sample: bool) -> StepInput:
        """A step whose sequences each draw greedily after their last token, if ``sample``."""
        counts = [chunk.count for chunk in chunks]
        query_start_loc = np.cumsum([0, *counts]).astype(np.int32)
        positions = np.concatenate([np.arange(c.start, c.start + c.count) for c in chunks])
        slots = np.repeat([chunk.slot for chunk in chunks], counts)
        tables = [
            np.arange(c.slot * self._blocks_per_slot, (c.slot + 1) * self._blocks_per_slot)
            for c in chunks
        ]
        slot_mapping = (slots * self._blocks_per_slot * BLOCK_SIZE + positions).astype(np.int64)
        groups = len(self._runner.kv_groups)  # all of them hold whole contexts here
        return StepInput(
            token_ids=(positions * 7919 % self._runner.vocab_size).astype(np.int32),
            positions=positions.astype(np.int32),
            slot_mapping=np.tile(slot_mapping, (groups, 1)),
            query_start_loc=query_start_loc,
            seq_lens=np.array([c.start + c.count for c in chunks], np.int32),
            block_tables=np.tile(np.array(tables, np.int32), (groups, 1, 1)),
            sample_rows=query_start_loc[1:] - 1 if sample else np.zeros(0, np.int32),
            **greedy_columns(len(chunks) if sample else 0),
        )

    def prefill(self, slot: int, count: int) -> list[StepInput]:
        """The steps of a prompt, the last of which draws."""
        starts = range(0, count, CHUNK)
        return [
            self.build([Chunk(slot, s, min(CHUNK, count - s))], sample=s + CHUNK >= count)
            for s in starts
        ]


def greedy_columns(rows: int) -> dict[str, npt.NDArray[Any]]:
    return {
        "target_ids": np.full(rows, -1, np.int32),
        "temperature": np.zeros(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "repetition_penalty": np.ones(rows, np.float32),
        "presence_penalty": np.zeros(rows, np.float32),
        "frequency_penalty": np.zeros(rows, np.float32),
        "seed": np.zeros(rows, np.uint64),
        "draw_index": np.zeros(rows, np.uint32),
        "num_logprobs": np.zeros(rows, np.int32),
        "state_slot": np.full(rows, -1, np.int32),
        "bias_indptr": np.zeros(rows + 1, np.int32),
        "bias_ids": np.zeros(0, np.int32),
        "bias_values": np.zeros(0, np.float32),
        "needs_mask": np.zeros(rows, np.uint8),
    }


def bench_prefill(report: Report, checkpoint: Checkpoint, runner: Runner, count: int) -> None:
    steps = Steps(runner, -(-count // BLOCK_SIZE))
    prompt = steps.prefill(0, count)

    def run() -> None:
        for step in prompt:
            steps.run(step)

    cost = Cost(0.0)
    for start in range(0, count, CHUNK):
        tokens = min(CHUNK, count - start)
        is_last = start + CHUNK >= count
        cost += model_step(checkpoint, tokens=tokens, sampled=int(is_last), start=start)
    report.add(f"prefill {count}", measure(run, seconds=2.0), cost, tokens=count)


def bench_decode(report: Report, checkpoint: Checkpoint, runner: Runner, streams: int) -> None:
    """The step that decodes token ``CONTEXT`` of each stream, over and over."""
    steps = Steps(runner, CONTEXT // BLOCK_SIZE + 1)
    for slot in range(streams):
        for step in steps.prefill(slot, CONTEXT):
            steps.run(step)
    step = steps.build([Chunk(slot, CONTEXT, 1) for slot in range(streams)], sample=True)
    cost = model_step(checkpoint, tokens=1, sampled=streams, start=CONTEXT)
    timing = measure(lambda: steps.run(step), seconds=2.0)
    name = f"decode {streams} stream{'s' * (streams > 1)}, context {CONTEXT}"
    report.add(name, timing, cost, tokens=streams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="GGUF file or Hugging Face folder")
    add_options(parser)
    options = parser.parse_args()
    if options.isa:
        os.environ["RAPSHEE_CPU_ISA"] = options.isa
    checkpoint = load_checkpoint(options.model)
    prompts = [count for count in PROMPTS if count <= checkpoint.config.max_position]
    blocks = max(
        max(STREAMS) * (CONTEXT // BLOCK_SIZE + 1), *(-(-count // BLOCK_SIZE) for count in prompts)
    )
    block_bytes = BLOCK_SIZE * kv_token_bytes(checkpoint.config, kv_dtype(checkpoint))
    config = EngineConfig(
        model=options.model,
        threads=options.threads,
        block_size=BLOCK_SIZE,
        max_num_seqs=max(STREAMS),
        max_num_batched_tokens=CHUNK,
        # A head size that is no multiple of 16 is padded in the cache.
        kv_cache_memory_bytes=int(2 * blocks * block_bytes),
    )
    runner = Runner(config, checkpoint)
    report = Report(Limits.measure(options.threads, options.isa), options.json)
    for count in prompts:
        bench_prefill(report, checkpoint, runner, count)
    for streams in STREAMS:
        bench_decode(report, checkpoint, runner, streams)
    runner.close()


if __name__ == "__main__":
    main()
