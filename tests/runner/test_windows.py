"""Layers with and without a window: a sequence keeps only the blocks that its windows see, and gets
the same bits, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from rapshee_engine import _core
from reference.devices import is_emulated, native_dtype
from reference.steps import BLOCK_SIZE, Chunk, StepArrays, make_runner, make_step
from reference.tiny_llama import make_config, make_weights, write_hf_folder

WINDOWS = (0, 20, 7)  # of three of the four layers; the last one has none
VOCAB = 160
POISON = VOCAB - 1  # a token whose keys and values are not numbers
NUM_BLOCKS = (24, 8, 8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model by the dtype of its matrices."""
    config = make_config(
        model_type="mistral",
        num_hidden_layers=4,
        vocab_size=VOCAB,
        max_position_embeddings=400,
        tie_word_embeddings=False,
    )
    weights = make_weights(config, seed=8)
    weights["model.embed_tokens.weight"][POISON] = np.nan
    path = tmp_path_factory.mktemp("windows")
    return {d: write_hf_folder(path / d, config, weights, dtype=d) for d in ("f32", "bf16")}


@pytest.fixture
def runner(folders: dict[str, Path], kernels: str) -> Iterator[_core.ModelRunner]:
    runner = make_runner(
        folders[native_dtype(kernels)],
        windows=[*WINDOWS, 0],
        device=kernels,
        num_blocks=list(NUM_BLOCKS),
    )
    yield runner
    runner.close()


class Sequence_:
    """A sequence of 300 tokens at most, with blocks of its own in each group of layers; those that
    its windows have passed are used again from the front.

    Attributes:
        tables: of each group, -1 for blocks that are gone.
        gone: of each group, blocks given back and not used again.
    """

    def __init__(self) -> None:
        self.tables: list[list[int]] = [[] for _ in WINDOWS]
        self.gone: list[list[int]] = [list(range(n)) for n in NUM_BLOCKS]

    def extend(self, start: int, end: int) -> None:
        """Take blocks for tokens up to ``end``, after giving back those that a query at ``start``
        does not see."""
        for window, table, gone in zip(WINDOWS, self.tables, self.gone, strict=True):
            first = max(0, start + 1 - window) // BLOCK_SIZE if window else 0
            for index in range(first):
                if table[index] >= 0:
                    gone.append(table[index])
                    table[index] = -1
            while len(table) * BLOCK_SIZE < end:
                table.append(gone.pop(0))

    def step(self, tokens: Sequence[int], start: int, num_logprobs: int = 4) -> StepArrays:
        """Tokens from ``start`` on, whose last one draws."""
        self.extend(start, start + len(tokens))
        chunk = Chunk(tokens, start, self.tables[0], dropped=(0,) * len(WINDOWS))
        positions = range(start, start + len(tokens))
        return make_step(
            [chunk],
            num_logprobs=num_logprobs,
            block_tables=np.array([[table] for table in self.tables], np.int32),
            slot_mapping=np.array(
                [[t[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
                 for t in self.tables],
                np.int64,
            ),
        )  # fmt: skip


def poison(runner: _core.ModelRunner, sequence: Sequence_) -> None:
    """Fill every block that nobody holds with what is not a number."""
    count = max(map(len, sequence.gone))
    tokens = [POISON] * (count * BLOCK_SIZE)
    step = make_step(
        [Chunk(tokens, 0, range(count), targets=[], dropped=(0,) * len(WINDOWS))],
        block_tables=np.array([[(g + [0] * count)[:count]] for g in sequence.gone], np.int32),
    )
    slots = [
        [
            gone[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            if p // BLOCK_SIZE < len(gone)
            else -1
            for p in range(len(tokens))
        ]
        for gone in sequence.gone
    ]
    runner.collect(runner.launch(**(step | {"slot_mapping": np.array(slots, np.int64)})))


def bits(out: _core.StepOutput) -> list[object]:
    return [out.token_ids.tolist(), out.top_ids.tolist(), out.top_logprobs.tobytes()]


def generate(
    runner: _core.ModelRunner, prompt: Sequence[int], count: int, chunk: int, *, poisoned: bool
) -> list[list[object]]:
    """The prompt in chunks, then ``count`` tokens: the outputs of its last row and of these."""
    sequence = Sequence_()
    outputs: list[list[object]] = []
    done, tokens = 0, list(prompt)
    while len(outputs) < count:
        step = sequence.step(tokens[done : done + chunk], done)
        if poisoned:
            poison(runner, sequence)
        out = runner.collect(runner.launch(**step))
        done = min(done + chunk, len(tokens))
        if done == len(tokens):
            outputs.append(bits(out))
            tokens.append(int(out.token_ids[0]))
    return outputs


def test_blocks_that_windows_have_passed_may_hold_anything(
    runner: _core.ModelRunner, kernels: str
) -> None:
    emulated = is_emulated(kernels)
    # Beyond the 256 keys at which attention closes its sums; the device's tiles are of 64.
    length, count = (70, 12) if emulated else (262, 30)
    prompt = [(11 * i) % 150 for i in range(length)]
    expected = generate(runner, prompt, count, 100, poisoned=False)
    assert all(out[0] != [-1] for out in expected)
    for chunk in (23,) if emulated else (100, 23, 1):
        assert generate(runner, prompt, count, chunk, poisoned=True) == expected


def test_two_steps_in_flight(runner: _core.ModelRunner, kernels: str) -> None:
    """The second of them begins before the first one has ended, and blocks that the first one has
    passed go to the second."""
    count = 12 if is_emulated(kernels) else 60
    prompt = [(7 * i) % 150 for i in range(37)]
    expected = generate(runner, prompt, count, 37, poisoned=False)
    sequence = Sequence_()
    ticket = runner.launch(**sequence.step(prompt, 0))
    outputs = []
    for i in range(count):
        following = runner.launch(**sequence.step([~0], 37 + i))
        outputs.append(bits(runner.collect(ticket)))
        ticket = following
    runner.collect(ticket)
    assert outputs == expected


def test_each_group_has_its_blocks(runner: _core.ModelRunner) -> None:
    assert runner.kv_windows == list(WINDOWS)
    assert runner.num_blocks == list(NUM_BLOCKS)
