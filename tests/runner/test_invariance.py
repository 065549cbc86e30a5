"""Bitwise invariance of the forward pass: what a row gets depends on its own sequence alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _core
from reference.steps import BLOCK_SIZE, Chunk, make_runner, make_step
from reference.tiny_llama import make_config, make_weights, write_gguf_file

DTYPES = ["f32", "bf16", "q4_1", "q8_0"]
TOP = 4
MAX_TOKENS = 1024
# 32 sequences; the longest crosses the boundary of 256 keys at which attention closes its sums.
LENGTHS = [290, 1, 2, 15, 16, 17, 31, 32, 33, 1, 8, 9, 40, 64, 3, 5] * 2
# Vocabulary and sizes that are no multiples of what kernels work in, as far as blocks allow it.
CONFIG = make_config(vocab_size=301, max_position_embeddings=320)

Prompt = tuple[int, ...]
# Of each token: log-probability of the next one, ids and log-probabilities of the best.
Scores = tuple[
    npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]
]


def make_prompts() -> list[Prompt]:
    random = np.random.default_rng(0)
    return [tuple(random.integers(0, 301, n + 1).tolist()) for n in LENGTHS]


PROMPTS = make_prompts()


@pytest.fixture(scope="module", params=DTYPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "tiny.gguf"
    return write_gguf_file(path, CONFIG, make_weights(CONFIG, seed=5), dtype=request.param)


@pytest.fixture(params=_core.build_info()["isas"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAPSHEE_CPU_ISA", request.param)
    return str(request.param)


@pytest.fixture
def runner(checkpoint: Path, isa: str) -> Iterator[_core.ModelRunner]:
    runner = open_runner(checkpoint, threads=1)
    assert isa in runner.description
    yield runner
    runner.close()


def open_runner(checkpoint: Path, threads: int) -> _core.ModelRunner:
    # Room for each sequence, in blocks that are handed out in a shuffled order.
    return make_runner(checkpoint, num_blocks=256, max_num_tokens=MAX_TOKENS, threads=threads)


def score(
    runner: _core.ModelRunner, prompts: Sequence[Prompt], chunk_sizes: Sequence[int]
) -> list[Scores]:
    """Feed the prompts side by side; sequence i goes in chunks of ``chunk_sizes[i % n]``."""
    free = np.random.default_rng(1).permutation(runner.num_blocks).tolist()
    blocks = [[free.pop() for _ in range(-(-len(p) // BLOCK_SIZE))] for p in prompts]
    sizes = [chunk_sizes[i % len(chunk_sizes)] for i in range(len(prompts))]
    done = [0] * len(prompts)
    parts: list[list[Scores]] = [[] for _ in prompts]
    while any(n < len(p) - 1 for n, p in zip(done, prompts, strict=True)):
        chunks: list[tuple[int, Chunk]] = []
        for i, prompt in enumerate(prompts):
            end = min(done[i] + sizes[i], len(prompt) - 1)
            if end > done[i]:
                tokens, targets = prompt[done[i] : end], prompt[done[i] + 1 : end + 1]
                chunks.append((i, Chunk(tokens, done[i], blocks[i], targets)))
                done[i] = end
        chunks.sort(key=lambda item: len(item[1].token_ids) > 1)
        out = runner.collect(runner.launch(**make_step([c for _, c in chunks], num_logprobs=TOP)))
        row = 0
        for i, chunk in chunks:
            rows = slice(row, row + len(chunk.token_ids))
            fields = (out.logprobs, out.ranks, out.top_ids, out.top_logprobs)
            parts[i].append(tuple(field[rows] for field in fields))
            row = rows.stop
    return [tuple(map(np.concatenate, zip(*part, strict=True))) for part in parts]


def assert_same_bits(actual: Sequence[Scores], expected: Sequence[Scores]) -> None:
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        for field, wanted in zip(one, other, strict=True):
            np.testing.assert_array_equal(field, wanted, err_msg=f"sequence {i}")


@pytest.fixture
def alone(runner: _core.ModelRunner) -> list[Scores]:
    """Each sequence by itself, in one step."""
    return [score(runner, [prompt], [len(prompt)])[0] for prompt in PROMPTS]


def test_scores_do_not_depend_on_batch_chunks_or_threads(
    checkpoint: Path, runner: _core.ModelRunner, alone: list[Scores]
) -> None:
    for logprobs, _, _, top in alone:
        assert np.isfinite(logprobs).all()
        assert (top[:, 0] >= logprobs).all()
    # All together: 1,134 tokens do not fit in one step, so the long ones take two.
    assert_same_bits(score(runner, PROMPTS, [150]), alone)
    assert_same_bits(score(runner, PROMPTS, [1, 7, 16, 290]), alone)
    assert_same_bits(score(runner, PROMPTS[:1], [1]), alone[:1])
    two = open_runner(checkpoint, threads=2)
    assert_same_bits(score(two, PROMPTS, [150]), alone)
    assert_same_bits(score(two, PROMPTS, [33, 1, 5]), alone)
    assert_same_bits([score(two, [p], [len(p)])[0] for p in PROMPTS[:4]], alone[:4])
    two.close()


@pytest.mark.usefixtures("isa")
def test_draws_do_not_depend_on_what_else_is_asked_of_the_row(runner: _core.ModelRunner) -> None:
    """A greedy row takes a shorter way when nobody wants its logits."""
    chunk = Chunk(PROMPTS[6][:20], 0, [3, 1])
    plain = runner.collect(runner.launch(**make_step([chunk])))
    listed = runner.collect(runner.launch(**make_step([chunk], num_logprobs=TOP)))
    token = plain.token_ids.tolist()
    scored = runner.collect(runner.launch(**make_step([chunk], target_ids=plain.token_ids)))
    assert listed.token_ids.tolist() == scored.token_ids.tolist() == token
    assert listed.top_ids[0, 0] == token[0]
    np.testing.assert_array_equal(listed.logprobs, plain.logprobs)
    np.testing.assert_array_equal(scored.logprobs, plain.logprobs)
