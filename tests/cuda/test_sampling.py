"""The kernels of sampling against the oracle in ``tests/reference/sampling.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops
from reference import sampling as oracle
from reference.sampling import RowOptions

CHUNK = 512  # tokens whose statistics a warp takes
LIST = 2048  # candidates that shared memory holds
SIZES = [1, 31, 32, 255, 256, 257, 511, 512, 513, 1000, 4099]
IN_PROMPT = 1 << 31
OPTIONS = {
    "greedy": RowOptions(temperature=0.0),
    "plain": RowOptions(),
    "cold": RowOptions(temperature=0.3),
    "hot": RowOptions(temperature=2.0),
    "top_k": RowOptions(top_k=5),
    "top_k_1": RowOptions(top_k=1),
    "top_k_many": RowOptions(top_k=300),
    "top_k_all": RowOptions(top_k=1 << 30),
    "top_p": RowOptions(top_p=0.9),
    "top_p_tiny": RowOptions(top_p=1e-6),
    "top_p_almost_1": RowOptions(top_p=0.999),
    "min_p": RowOptions(min_p=0.05),
    "min_p_1": RowOptions(min_p=1.0),
    "min_p_then_top_p": RowOptions(min_p=0.01, top_p=0.8),
    "filters": RowOptions(temperature=0.7, top_k=40, top_p=0.95, min_p=0.01),
}
# Sums of exponentials: 2 ulp each and rounded arguments, relative; of the logarithm absolute.
LOGPROB_ERROR = 1e-6
Logits = npt.NDArray[np.float32]


class Result(NamedTuple):
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]
    counts: npt.NDArray[np.uint32]
    microseconds: npt.NDArray[np.float32]


def pack_mask(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    bits = np.zeros(-(-len(allowed) // 32) * 32, dtype=np.uint8)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.uint32)


def count_tokens(row: RowOptions, vocab: int) -> npt.NDArray[np.uint32]:
    counts = np.zeros(vocab, dtype=np.uint32)
    counts[list(row.prompt)] = IN_PROMPT
    for token, count in Counter(row.output).items():
        counts[token] += count
    return counts


def sample(logits: Logits, rows: Sequence[RowOptions], rows_per_launch: int = 0) -> Result:
    """Each row that needs them gets a mask and a slot of its own, in reverse order."""
    vocab = logits.shape[1]

    def column(name: str, dtype: type) -> npt.NDArray[Any]:
        return np.array([getattr(row, name) for row in rows], dtype=dtype)

    def indices(chosen: Sequence[bool]) -> npt.NDArray[np.int32]:
        order = np.cumsum(chosen, dtype=np.int32)
        return np.where(chosen, order[-1:] - order, -1).astype(np.int32)

    has_slot = [
        bool(row.prompt or row.output or row.presence_penalty or row.frequency_penalty)
        for row in rows
    ]
    masks = [pack_mask(row.allowed) for row in reversed(rows) if row.allowed is not None]
    counts = [
        count_tokens(row, vocab)
        for row, slot in zip(reversed(rows), reversed(has_slot), strict=True)
        if slot
    ]
    columns = {
        "target_ids": column("target_id", np.int32),
        "temperature": column("temperature", np.float32),
        "top_k": column("top_k", np.int32),
        "top_p": column("top_p", np.float32),
        "min_p": column("min_p", np.float32),
        "repetition_penalty": column("repetition_penalty", np.float32),
        "presence_penalty": column("presence_penalty", np.float32),
        "frequency_penalty": column("frequency_penalty", np.float32),
        "seed": column("seed", np.uint64),
        "draw_index": column("draw_index", np.uint32),
        "num_logprobs": column("num_logprobs", np.int32),
        "state_slot": indices(has_slot),
        "bias_indptr": np.cumsum([0, *(len(row.bias) for row in rows)], dtype=np.int32),
        "bias_ids": np.array([token for row in rows for token in row.bias], dtype=np.int32),
        "bias_values": np.array(
            [value for row in rows for value in row.bias.values()], dtype=np.float32
        ),
        "mask_index": indices([row.allowed is not None for row in rows]),
    }
    return sample_columns(
        logits,
        columns,
        masks=np.array(masks, dtype=np.uint32).reshape(len(masks), -(-vocab // 32)),
        counts=np.array(counts, dtype=np.uint32).reshape(len(counts), vocab),
        rows_per_launch=rows_per_launch,
    )


def sample_columns(
    logits: Logits,
    columns: Mapping[str, npt.NDArray[Any]],
    masks: npt.NDArray[np.uint32] | None = None,
    counts: npt.NDArray[np.uint32] | None = None,
    rows_per_launch: int = 0,
) -> Result:
    """Neutral options for all columns that are not given."""
    count, vocab = logits.shape
    defaults: dict[str, npt.NDArray[Any]] = {
        "target_ids": np.full(count, -1, np.int32),
        "temperature": np.ones(count, np.float32),
        "top_k": np.zeros(count, np.int32),
        "top_p": np.ones(count, np.float32),
        "min_p": np.zeros(count, np.float32),
        "repetition_penalty": np.ones(count, np.float32),
        "presence_penalty": np.zeros(count, np.float32),
        "frequency_penalty": np.zeros(count, np.float32),
        "seed": np.zeros(count, np.uint64),
        "draw_index": np.arange(count, dtype=np.uint32),
        "num_logprobs": np.zeros(count, np.int32),
        "state_slot": np.full(count, -1, np.int32),
        "bias_indptr": np.zeros(count + 1, np.int32),
        "bias_ids": np.zeros(0, np.int32),
        "bias_values": np.zeros(0, np.float32),
        "mask_index": np.full(count, -1, np.int32),
    }
    if masks is None:
        masks = np.zeros((0, -(-vocab // 32)), np.uint32)
    if counts is None:
        counts = np.zeros((0, vocab), np.uint32)
    result = cuda_ops.sample(
        logits,
        masks=masks,
        counts=counts,
        rows_per_launch=rows_per_launch,
        **{**defaults, **columns},
    )
    return Result(*result)


def make_logits(vocab: int, seed: int, scale: float = 3.0) -> Logits:
    return np.random.default_rng(seed).normal(0.0, scale, vocab).astype(np.float32)


def check(logits: Logits, rows: Sequence[RowOptions], result: Result) -> None:
    """Everything that the rows get, against the oracle."""
    vocab = logits.shape[1]
    with_slots = 0
    for r, row in enumerate(rows):
        token = int(result.token_ids[r])
        assert token in oracle.plausible_tokens(logits[r], row), f"row {r}: {row}"
        n = row.num_logprobs if token >= 0 else 0
        assert (result.top_ids[r, n:] == -1).all()
        assert (result.top_logprobs[r, n:] == -np.inf).all()
        if token < 0:
            assert np.isnan(result.logprobs[r])
            assert result.ranks[r] == 0
        else:
            expected = oracle.log_probs(logits[r])
            assert result.logprobs[r] == pytest.approx(
                expected[token], abs=LOGPROB_ERROR, rel=LOGPROB_ERROR
            )
            ranked = row.num_logprobs > 0 or row.target_id >= 0
            assert result.ranks[r] == (oracle.rank_of(logits[r], token) if ranked else 0)
            np.testing.assert_array_equal(result.top_ids[r, :n], oracle.top_ids(logits[r], n))
            np.testing.assert_allclose(
                result.top_logprobs[r, :n],
                expected[result.top_ids[r, :n]],
                atol=LOGPROB_ERROR,
                rtol=LOGPROB_ERROR,
            )
        if row.prompt or row.output or row.presence_penalty or row.frequency_penalty:
            with_slots += 1
            counts = count_tokens(row, vocab)
            if token >= 0 and row.target_id < 0:
                counts[token] += 1
            np.testing.assert_array_equal(result.counts[-with_slots], counts)
    assert len(result.counts) == with_slots


def chi_square(tokens: npt.NDArray[np.int32], probs: npt.NDArray[np.float64]) -> float:
    support = probs > 0
    counts = np.bincount(tokens, minlength=len(probs))
    assert not counts[~support].any(), "drew a token that was filtered out"
    expected = probs[support] * len(tokens)
    return float(((counts[support] - expected) ** 2 / expected).sum())


def draw(logits: Logits, row: RowOptions, count: int) -> npt.NDArray[np.int32]:
    """The first ``count`` draws of one request."""
    rows = [replace(row, draw_index=i) for i in range(count)]
    return sample(np.tile(logits, (count, 1)), rows).token_ids


@pytest.mark.parametrize("vocab", SIZES)
def test_every_option_matches_the_oracle(vocab: int) -> None:
    logits = np.stack([make_logits(vocab, seed) for seed in range(len(OPTIONS))])
    rows = [replace(row, seed=7 + i, draw_index=i * i) for i, row in enumerate(OPTIONS.values())]
    check(logits, rows, sample(logits, rows))


def test_a_real_vocabulary() -> None:
    logits = np.stack([make_logits(32000, seed) for seed in range(4)])
    rows = [
        RowOptions(seed=1, num_logprobs=20),
        RowOptions(top_k=50, top_p=0.95, temperature=0.7, num_logprobs=1),
        RowOptions(top_p=0.9, allowed=np.arange(32000) % 5 > 0, bias={31999: 15.0}),
        RowOptions(top_p=0.5, temperature=1.5, output=tuple(range(99)), presence_penalty=1.0),
    ]
    check(logits, rows, sample(logits, rows))


def test_token_is_exact_where_no_edge_is_near() -> None:
    logits = make_logits(257, 0)
    rows = [replace(row, draw_index=i) for row in OPTIONS.values() for i in range(20)]
    expected = [oracle.plausible_tokens(logits, row) for row in rows]
    clear = [r for r, tokens in enumerate(expected) if len(tokens) == 1]
    assert len(clear) > 0.95 * len(rows)
    token_ids = sample(np.tile(logits, (len(rows), 1)), rows).token_ids
    assert [{int(token_ids[r])} for r in clear] == [expected[r] for r in clear]


@pytest.mark.parametrize("vocab", SIZES)
def test_equal_logits(vocab: int) -> None:
    logits = np.full(vocab, -1.5, dtype=np.float32)
    rows = [replace(row, seed=3, draw_index=i) for i, row in enumerate(OPTIONS.values())]
    token_ids = sample(np.tile(logits, (len(rows), 1)), rows).token_ids
    for token, row in zip(token_ids, rows, strict=True):
        # Ties are kept, so that every filter keeps everything.
        plain = RowOptions(temperature=row.temperature, seed=3, draw_index=row.draw_index)
        assert token in oracle.plausible_tokens(logits, plain)


@pytest.mark.parametrize("vocab", [1, 33, 600])
def test_masks_with_one_token_and_with_none(vocab: int) -> None:
    logits = np.tile(make_logits(vocab, 5), (2 * len(OPTIONS), 1))
    only = int(logits[0].argmin())
    rows = [
        replace(row, allowed=allowed, bias={only: -50.0}, num_logprobs=1, output=(only,))
        for row in OPTIONS.values()
        for allowed in (np.arange(vocab) == only, np.zeros(vocab, dtype=np.bool_))
    ]
    result = sample(logits, rows)
    assert set(result.token_ids[::2]) == {only}
    assert set(result.token_ids[1::2]) == {-1}
    check(logits, rows, result)


@pytest.mark.parametrize("at", [0, 280, 599])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_give_no_token(value: float, at: int) -> None:
    bad = make_logits(600, 0)
    bad[at] = value
    good = make_logits(600, 1)
    allowed = np.arange(600) != at
    rows = [
        *OPTIONS.values(),
        RowOptions(target_id=4, num_logprobs=3),
        RowOptions(allowed=allowed, output=(at,), presence_penalty=1.0, num_logprobs=2),
        RowOptions(allowed=allowed, top_k=7),
    ]
    logits = np.stack([bad, good] * len(rows))
    both = [row for row in rows for _ in range(2)]
    result = sample(logits, both)
    assert set(result.token_ids[::2]) == {-1}
    assert -1 not in result.token_ids[1::2]
    check(logits, both, result)


def test_everything_not_a_number() -> None:
    logits = np.full((len(OPTIONS), 40), np.nan, np.float32)
    result = sample(logits, [replace(row, num_logprobs=2) for row in OPTIONS.values()])
    assert set(result.token_ids) == {-1}
    assert (result.top_ids == -1).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (RowOptions(output=(2,)), 2),
        (RowOptions(output=(2,), repetition_penalty=2.0), 1),
        (RowOptions(prompt=(2,), repetition_penalty=2.0), 1),
        (RowOptions(output=(2,), presence_penalty=1.5), 1),
        (RowOptions(prompt=(2,), presence_penalty=1.5), 2),
        (RowOptions(output=(2,), frequency_penalty=0.4), 2),
        (RowOptions(output=(2,) * 3, frequency_penalty=0.4), 1),
        (RowOptions(output=(0,), presence_penalty=-2.0), 2),
        (RowOptions(output=(0,) * 3, frequency_penalty=-2.0), 0),
        (RowOptions(bias={0: 7.0}), 0),
        (RowOptions(bias={1: 1.0, 0: 6.0}), 0),  # a tie: the lowest id
        (RowOptions(bias={2: -100.0}), 1),
    ],
)
def test_each_change_to_the_logits(options: RowOptions, expected: int) -> None:
    logits = np.array([[-2.0, 3.0, 4.0]], dtype=np.float32)
    assert sample(logits, [replace(options, temperature=0.0)]).token_ids[0] == expected


def test_extremes_stay_finite() -> None:
    """Penalties, biases and temperatures beyond the floats exclude their token alone."""
    logits = np.array([1.0, 2.0, -1.0, 0.5], dtype=np.float32)
    cold = RowOptions(temperature=1e-45, prompt=(0,), repetition_penalty=1e-45)
    assert set(draw(logits, cold, 8)) == {0}
    penalised = RowOptions(output=(1, 1), repetition_penalty=1e-45, frequency_penalty=3e38)
    assert set(draw(logits, penalised, 64)) == {0, 2, 3}
    masked = RowOptions(
        output=(1, 1), frequency_penalty=-3e38, allowed=np.array([True, False, True, True])
    )
    assert set(draw(logits, masked, 64)) == {0, 2, 3}
    assert set(draw(logits, RowOptions(bias={2: 3.4e38}), 8)) == {2}
    far_apart = np.array([3e38, -3e38, 3e38], dtype=np.float32)
    assert set(draw(far_apart, RowOptions(top_p=0.9), 16)) == {0, 2}


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 3e38])
def test_temperatures_at_the_ends(temperature: float) -> None:
    logits = np.stack([make_logits(700, 3)] * 24)
    cut = [RowOptions(), RowOptions(top_p=0.4), RowOptions(min_p=0.5), RowOptions(top_k=9)]
    rows = [
        replace(row, temperature=float(np.float32(temperature)), draw_index=i)
        for row in cut
        for i in range(6)
    ]
    check(logits, rows, sample(logits, rows))


def test_a_token_with_several_biases_has_them_in_order() -> None:
    logits = np.zeros((1, 40), np.float32)
    columns = {
        "temperature": np.zeros(1, np.float32),
        "bias_indptr": np.array([0, 41], np.int32),
        # 2^25 + 1 is 2^25: in this order nothing is left of the ones.
        "bias_ids": np.array([7] * 40 + [3], np.int32),
        "bias_values": np.array([2.0**25, *[1.0] * 38, -(2.0**25), 0.5], np.float32),
    }
    assert sample_columns(logits, columns).token_ids[0] == 3


def test_drawn_tokens_are_counted_and_scored_ones_are_not() -> None:
    logits = np.tile(make_logits(70, 2), (3, 1))
    best = int(logits[0].argmax())
    columns = {
        "temperature": np.zeros(3, np.float32),
        "target_ids": np.array([-1, 5, -1], np.int32),
        "state_slot": np.array([1, 1, 1], np.int32),
    }
    counts = np.full((2, 70), 3, np.uint32)
    after = sample_columns(logits, columns, counts=counts).counts
    counts[1, best] += 2
    np.testing.assert_array_equal(after, counts)


@pytest.mark.parametrize("distinct", [3, 1 << 20])
@pytest.mark.parametrize("vocab", [1, 31, 513, 1000])
def test_most_likely_tokens_and_ranks(vocab: int, distinct: int) -> None:
    """With few distinct logits there are many ties, which go by id."""
    logits = np.round(make_logits(vocab, 9) * distinct / 4) / np.float32(distinct)
    counts = sorted({n for n in (0, 1, 2, 20, vocab // 2, vocab) if n <= vocab})
    rows = [RowOptions(temperature=0.0, num_logprobs=n) for n in counts]
    logits = np.tile(logits, (len(rows), 1))
    check(logits, rows, sample(logits, rows))


@pytest.mark.parametrize("distinct", [3, 1 << 20])
def test_more_of_the_most_likely_than_shared_memory_holds(distinct: int) -> None:
    vocab = 4099
    assert vocab > LIST
    logits = np.round(make_logits(vocab, 9) * distinct / 4) / np.float32(distinct)
    rows = [RowOptions(num_logprobs=n) for n in (vocab, 3, 1025)]
    logits = np.tile(logits, (len(rows), 1))
    check(logits, rows, sample(logits, rows))


def test_zeros_of_both_signs_are_equal() -> None:
    logits = np.zeros((3, 64), np.float32)
    logits[:, ::2] *= -1.0
    rows = [
        RowOptions(temperature=0.0, num_logprobs=64),
        RowOptions(target_id=40),
        RowOptions(top_k=3, draw_index=9),
    ]
    check(logits, rows, sample(logits, rows))


@pytest.mark.parametrize("vocab", SIZES)
def test_targets_are_scored_and_not_drawn(vocab: int) -> None:
    logits = make_logits(vocab, 2)
    targets = sorted({0, vocab // 3, vocab - 1})
    # What would be done to the logits is left alone.
    rows = [RowOptions(target_id=t, top_k=1, bias={0: 9.0}, num_logprobs=1) for t in targets]
    logits = np.tile(logits, (len(rows), 1))
    check(logits, rows, sample(logits, rows))


def test_ties_at_the_edge_of_top_k_are_kept() -> None:
    logits = make_logits(1200, 4, scale=0.1)
    tied = [3, 511, 512, 1199]
    logits[tied] = 4.0
    logits[700] = 5.0
    tokens = draw(logits, RowOptions(top_k=2, temperature=3.0), 96)
    assert set(tokens) == {700, *tied}


def test_candidates_that_do_not_fit_are_read_again() -> None:
    vocab = 3 * LIST
    logits = np.stack([make_logits(vocab, seed, scale=0.3) for seed in range(6)])
    rows = [
        RowOptions(top_k=vocab - 5),
        RowOptions(top_k=2500, top_p=0.7),
        RowOptions(top_p=0.98),
        RowOptions(top_p=0.9, allowed=np.arange(vocab) >= 2 * CHUNK),
        RowOptions(min_p=1e-3),
        RowOptions(min_p=1e-3, top_p=0.6),
    ]
    check(logits, rows, sample(logits, rows))


@pytest.mark.parametrize(
    ("name", "count"),
    [("plain", 20000), ("hot", 2000), ("top_k", 2000), ("top_p", 2000), ("filters", 2000)],
)
def test_frequencies_follow_the_probabilities(name: str, count: int) -> None:
    row = replace(OPTIONS[name], seed=1234)
    logits = make_logits(24, 11, scale=1.5)
    tokens = draw(logits, row, count)
    probs = oracle.survivor_probs(logits, row)
    # At 23 degrees of freedom or fewer, 1 in 10,000 seeds would exceed this; the seed is fixed.
    assert chi_square(tokens, probs) < 57.0


def test_chunks_are_covered_evenly() -> None:
    tokens = draw(np.zeros(8 * CHUNK, dtype=np.float32), RowOptions(seed=5), 512)
    # 7 degrees of freedom, the same chance.
    assert chi_square(tokens // CHUNK, np.full(8, 1 / 8)) < 30.0


def mixed_rows(vocab: int) -> tuple[Logits, list[RowOptions]]:
    rows = [
        RowOptions(temperature=0.0),
        RowOptions(seed=5),
        RowOptions(seed=6, top_k=5, top_p=0.8),
        RowOptions(seed=7, allowed=np.arange(vocab) % 2 == 0, bias={1: 9.0, vocab - 1: 1.0}),
        RowOptions(seed=8, num_logprobs=7),
        RowOptions(target_id=vocab // 2, num_logprobs=2),
        RowOptions(seed=9, prompt=(1, 2), output=(2, 3, 3), repetition_penalty=1.2, top_p=0.9),
        RowOptions(seed=10, temperature=1.7, min_p=0.02),
    ]
    return np.stack([make_logits(vocab, 30 + i) for i in range(len(rows))]), rows


def assert_same_bits(some: Result, r: int, other: Result, q: int, n: int) -> None:
    for field in ("token_ids", "logprobs", "ranks"):
        assert getattr(some, field)[r] == getattr(other, field)[q]
    np.testing.assert_array_equal(some.top_ids[r, :n], other.top_ids[q, :n])
    np.testing.assert_array_equal(some.top_logprobs[r, :n], other.top_logprobs[q, :n])


@pytest.mark.parametrize("vocab", [31, 513, 2500])
def test_a_row_has_the_same_bits_alone_and_among_others(vocab: int) -> None:
    logits, rows = mixed_rows(vocab)
    together = sample(logits, rows)
    check(logits, rows, together)
    backwards = sample(logits[::-1].copy(), rows[::-1])
    in_threes = sample(logits, rows, rows_per_launch=3)
    np.testing.assert_array_equal(in_threes.counts, together.counts)
    for r, row in enumerate(rows):
        n = row.num_logprobs
        assert_same_bits(together, r, sample(logits[r : r + 1], [row]), 0, n)
        assert_same_bits(together, r, backwards, len(rows) - 1 - r, n)
        assert_same_bits(together, r, in_threes, r, n)


def test_the_order_of_threads_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows = mixed_rows(2500)
    before = sample(logits, rows)
    for seed in ("1", "77"):
        monkeypatch.setenv("RAPSHEE_EMU_SEED", seed)
        for some, other in zip(before, sample(logits, rows), strict=True):
            np.testing.assert_array_equal(some, other)


def random_row(random: np.random.Generator, vocab: int) -> RowOptions:
    def tokens(most: int) -> tuple[int, ...]:
        return tuple(random.integers(0, vocab, random.integers(0, most + 1)).tolist())

    return RowOptions(
        target_id=int(random.integers(0, vocab)) if random.random() < 0.1 else -1,
        temperature=float(random.choice([0.0, 0.01, 0.7, 1.0, 2.0])),
        top_k=int(random.choice([0, 0, 1, 2, 17, vocab])),
        top_p=float(random.choice([1e-3, 0.3, 0.97, 1.0, 1.0])),
        min_p=float(random.choice([0.0, 0.0, 0.03, 1.0])),
        repetition_penalty=float(random.choice([0.5, 1.0, 1.0, 2.0])),
        presence_penalty=float(random.choice([-2.0, 0.0, 0.0, 1.0])),
        frequency_penalty=float(random.choice([-1.0, 0.0, 0.0, 0.5])),
        seed=int(random.integers(0, 1 << 63)) * 2 + 1,
        draw_index=int(random.integers(0, 1 << 32)),
        num_logprobs=int(random.choice([0, 0, 1, min(20, vocab), vocab])),
        bias={token: float(random.choice([-100.0, 1.0, 30.0])) for token in tokens(4)},
        allowed=random.random(vocab) < 0.5 if random.random() < 0.3 else None,
        prompt=tokens(5),
        output=tokens(5),
    )


@pytest.mark.parametrize("seed", range(12))
def test_any_combination_matches_the_oracle(seed: int) -> None:
    random = np.random.default_rng(seed)
    vocab = int(random.integers(1, 700))
    rows = [random_row(random, vocab) for _ in range(16)]
    # Apart by more than rounding: the oracle, in float64, tells closer logits from each other.
    levels = random.integers(-50 * 64, 50 * 64, random.integers(1, 41)) / 64
    logits = random.choice(levels, (len(rows), vocab)).astype(np.float32)
    check(logits, rows, sample(logits, rows))


def test_no_rows() -> None:
    result = sample(np.zeros((0, 5), np.float32), [])
    assert result.token_ids.shape == (0,)
    assert result.top_ids.shape == (0, 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", np.zeros(2, np.float64), "temperature: got dtype float64"),
        ("temperature", np.zeros(3, np.float32), "temperature: got 3 elements, expected 2"),
        ("target_ids", np.array([0, 10], np.int32), r"target_ids\[1\]: got 10"),
        ("num_logprobs", np.array([11, 0], np.int32), r"num_logprobs\[0\]: got 11"),
        ("state_slot", np.array([0, -1], np.int32), r"state_slot\[0\]: got 0"),
        ("mask_index", np.array([-1, 0], np.int32), r"mask_index\[1\]: got 0"),
        ("bias_indptr", np.array([0, 2, 1], np.int32), "bias_indptr must rise"),
        ("unknown", np.zeros(2, np.int32), "got 17 columns, expected 16"),
    ],
)
def test_wrong_arrays_are_refused(name: str, value: npt.NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_columns(np.zeros((2, 10), np.float32), {name: value})
