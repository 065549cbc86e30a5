"""Bitwise invariance of the forward pass: what a row gets depends on its own sequence alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _core
from reference.devices import is_emulated
from reference.steps import BLOCK_SIZE, Chunk, make_runner, make_step
from reference.tiny_families import family_config, family_weights, write_family_gguf
from reference.tiny_llama import make_config, make_weights, write_gguf_file

# Of matrices, each with a family; together they take every way through the decoder.
DTYPES = {"f32": "olmo2", "bf16": "qwen3", "q4_1": "gemma2", "q8_0": "granite", "mixed": "llama"}
# Those of "mixed", whose rows are whole blocks of 256.
MIXED = {
    "q_proj": "q5_0", "k_proj": "q5_1", "v_proj": "q6_k", "o_proj": "q5_k", "gate_proj": "q2_k",
    "up_proj": "q3_k",
}  # fmt: skip
TOP = 4
# 32 sequences; the longest crosses the boundary of 256 keys at which attention closes its sums.
LENGTHS = [290, 1, 2, 15, 16, 17, 31, 32, 33, 1, 8, 9, 40, 64, 3, 5] * 2
# The same boundary and the same kinds of batches, for a device that is emulated.
FEW_LENGTHS = [258, 1, 17, 5]

Prompt = tuple[int, ...]
# Of each token: log-probability of the next one, ids and log-probabilities of the best.
Scores = tuple[
    npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]
]


@pytest.fixture(scope="module", params=DTYPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Vocabulary and sizes that are no multiples of what kernels work in, as far as blocks allow it.
    sizes = {"vocab_size": 301, "max_position_embeddings": 320}
    path = tmp_path_factory.mktemp(request.param) / "tiny.gguf"
    if request.param == "mixed":
        config = make_config(**sizes, hidden_size=256, intermediate_size=256)
        return write_gguf_file(
            path, config, make_weights(config, seed=5), dtype="q4_k", dtypes=MIXED
        )
    config = family_config(DTYPES[request.param], **sizes)
    return write_family_gguf(path, config, family_weights(config, seed=5), dtype=request.param)


@pytest.fixture
def prompts(kernels: str) -> list[Prompt]:
    random = np.random.default_rng(0)
    lengths = FEW_LENGTHS if is_emulated(kernels) else LENGTHS
    return [tuple(random.integers(0, 301, n + 1).tolist()) for n in lengths]


@pytest.fixture
def runner(checkpoint: Path, kernels: str) -> Iterator[_core.ModelRunner]:
    runner = open_runner(checkpoint, kernels, threads=1)
    assert os.environ.get("RAPSHEE_CPU_ISA", "") in runner.description
    yield runner
    runner.close()


def open_runner(
    checkpoint: Path, device: str, threads: int, kv_dtype: str = "auto"
) -> _core.ModelRunner:
    # Room for each sequence, in blocks that are handed out in a shuffled order.
    return make_runner(
        checkpoint,
        device=device,
        kv_dtype=kv_dtype,
        num_blocks=256,
        max_num_tokens=1024,
        threads=threads,
    )


def score(
    runner: _core.ModelRunner, prompts: Sequence[Prompt], chunk_sizes: Sequence[int]
) -> list[Scores]:
    """Feed the prompts side by side; sequence i goes in chunks of ``chunk_sizes[i % n]``."""
    free = np.random.default_rng(1).permutation(runner.num_blocks[0]).tolist()
    blocks = [[free.pop() for _ in range(-(-len(p) // BLOCK_SIZE))] for p in prompts]
    sizes = [chunk_sizes[i % len(chunk_sizes)] for i in range(len(prompts))]
    done = [0] * len(prompts)
    parts: list[list[Scores]] = [[] for _ in prompts]
    dropped = [0] * len(runner.kv_windows)
    while any(n < len(p) - 1 for n, p in zip(done, prompts, strict=True)):
        chunks: list[tuple[int, Chunk]] = []
        for i, prompt in enumerate(prompts):
            end = min(done[i] + sizes[i], len(prompt) - 1)
            if end > done[i]:
                tokens, targets = prompt[done[i] : end], prompt[done[i] + 1 : end + 1]
                chunks.append((i, Chunk(tokens, done[i], blocks[i], targets, dropped)))
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
def alone(runner: _core.ModelRunner, prompts: list[Prompt]) -> list[Scores]:
    """Each sequence by itself, in one step."""
    return [score(runner, [prompt], [len(prompt)])[0] for prompt in prompts]


def test_scores_do_not_depend_on_batch_chunks_or_threads(
    checkpoint: Path,
    kernels: str,
    runner: _core.ModelRunner,
    prompts: list[Prompt],
    alone: list[Scores],
) -> None:
    emulated = is_emulated(kernels)
    for logprobs, _, _, top in alone:
        assert np.isfinite(logprobs).all()
        assert (top[:, 0] >= logprobs).all()
    # All together: 1,134 tokens do not fit in one step, so the long ones take two.
    assert_same_bits(score(runner, prompts, [150]), alone)
    assert_same_bits(score(runner, prompts, [290 if emulated else 1, 7, 16, 290]), alone)
    short = prompts[0][: 41 if emulated else None]
    assert_same_bits(score(runner, [short], [1]), [first(alone[0], len(short) - 1)])
    two = open_runner(checkpoint, kernels, threads=2)
    assert_same_bits(score(two, prompts, [150]), alone)
    assert_same_bits(score(two, prompts, [33, 1, 5]), alone)
    assert_same_bits([score(two, [p], [len(p)])[0] for p in prompts[:4]], alone[:4])
    two.close()


@pytest.mark.parametrize("checkpoint", ["q8_0"], indirect=True)  # the cache knows no format
def test_scores_over_an_int8_cache_do_not_either(
    checkpoint: Path, kernels: str, prompts: list[Prompt]
) -> None:
    if kernels != "cpu":
        with pytest.raises(_core.DeviceError, match="kv_dtype=int8"):
            open_runner(checkpoint, kernels, threads=2, kv_dtype="int8")
        return
    runner = open_runner(checkpoint, kernels, threads=2, kv_dtype="int8")
    assert runner.kv_dtype == "int8"
    alone = [score(runner, [prompt], [len(prompt)])[0] for prompt in prompts]
    assert_same_bits(score(runner, prompts, [150]), alone)
    assert_same_bits(score(runner, prompts, [1, 7, 16, 290]), alone)
    runner.close()


def first(scores: Scores, count: int) -> Scores:
    logprobs, ranks, ids, top = (field[:count] for field in scores)
    return logprobs, ranks, ids, top


def test_draws_do_not_depend_on_what_else_is_asked_of_the_row(
    runner: _core.ModelRunner, prompts: list[Prompt]
) -> None:
    """A greedy row takes a shorter way when nobody wants its logits."""
    chunk = Chunk(prompts[0][:20], 0, [3, 1], dropped=[0] * len(runner.kv_windows))
    plain = runner.collect(runner.launch(**make_step([chunk])))
    listed = runner.collect(runner.launch(**make_step([chunk], num_logprobs=TOP)))
    token = plain.token_ids.tolist()
    scored = runner.collect(runner.launch(**make_step([chunk], target_ids=plain.token_ids)))
    assert listed.token_ids.tolist() == scored.token_ids.tolist() == token
    assert listed.top_ids[0, 0] == token[0]
    np.testing.assert_array_equal(listed.logprobs, plain.logprobs)
    np.testing.assert_array_equal(scored.logprobs, plain.logprobs)
