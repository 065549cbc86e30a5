"""Attention of one KV head over a paged cache against numpy. The cache holds NaN wherever nothing
was written, so each result also shows that nothing stale was read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _core
from reference.attention import attention
from reference.quant import round_trip

ISAS = _core.build_info()["isas"]
DTYPES = ["f32", "bf16", "int8"]
# f32: scores of about 30 with a few roundings of 2^-24, which exp makes relative errors. bf16: also
# the weights of the keys, half a unit in the last of their 8 bits each, up and down.
RELATIVE_ERROR = {"f32": 1e-5, "bf16": 2.0**-8, "int8": 1e-5}

Floats = npt.NDArray[np.float32]
pytestmark = [pytest.mark.parametrize("isa", ISAS), pytest.mark.parametrize("dtype", DTYPES)]


def stored(rows: Floats, dtype: str) -> Floats:
    """What the cache holds of keys or values [n, head_dim]; int8 has a scale for each row."""
    if dtype != "int8":
        return round_trip(rows, dtype)
    most = np.abs(rows).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    return np.clip(np.rint(rows * inverse), -127, 127) * (most / np.float32(127))


@dataclass(frozen=True)
class Case:
    """Queries at ``positions`` over keys and values of one sequence in shuffled blocks."""

    q: Floats
    k: Floats
    v: Floats
    positions: npt.NDArray[np.int32]
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0

    def run(self, isa: str, dtype: str) -> Floats:
        blocks = -(-len(self.k) // self.block_size)
        # Two blocks more than needed: they are another sequence's.
        table = np.random.default_rng(1).permutation(blocks + 2).astype(np.int32)
        cache = _core.PagedCache(
            self.k, self.v, table, block_size=self.block_size, dtype=dtype, isa=isa
        )
        return cache.attend(
            self.q,
            self.positions,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def check(self, isa: str, dtype: str) -> None:
        q = self.q if dtype == "int8" else round_trip(self.q, dtype)
        k, v = stored(self.k, dtype), stored(self.v, dtype)
        expected, magnitude = attention(
            q,
            k,
            v,
            self.positions,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )
        excess = np.abs(self.run(isa, dtype) - expected) - RELATIVE_ERROR[dtype] * magnitude
        assert (excess <= 1e-7).all(), f"off by {excess.max()} more than allowed"

    def at(self, index: int, length: int) -> Case:
        """One of the queries, over the first ``length`` keys."""
        rows = slice(index, index + 1)
        return Case(
            self.q[rows].copy(),
            self.k[:length].copy(),
            self.v[:length].copy(),
            self.positions[rows].copy(),
            self.block_size,
            self.window,
            self.softcap,
        )


def make_case(
    length: int,
    *,
    head_dim: int = 16,
    group: int = 3,
    queries: int = 4,
    block_size: int = 16,
    window: int = 0,
    softcap: float = 0.0,
) -> Case:
    """The last ``queries`` positions of a sequence (all of a shorter one)."""
    random = np.random.default_rng(length * 1000 + head_dim)
    queries = min(queries, length)

    def draw(*shape: int) -> Floats:
        return random.standard_normal(shape).astype(np.float32) * 2

    return Case(
        q=draw(queries, group, head_dim),
        k=draw(length, head_dim),
        v=draw(length, head_dim),
        positions=np.arange(length - queries, length, dtype=np.int32),
        block_size=block_size,
        window=window,
        softcap=softcap,
    )


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 255, 256, 257, 258, 511, 512, 513, 700])
def test_lengths_around_groups_blocks_and_splits(isa: str, dtype: str, length: int) -> None:
    make_case(length).check(isa, dtype)


@pytest.mark.parametrize("head_dim", [2, 8, 16, 18, 64, 80, 128])
def test_head_sizes(isa: str, dtype: str, head_dim: int) -> None:
    make_case(83, head_dim=head_dim).check(isa, dtype)


@pytest.mark.parametrize("group", range(1, 10))
def test_groups(isa: str, dtype: str, group: int) -> None:
    make_case(50, group=group, queries=5).check(isa, dtype)


@pytest.mark.parametrize("block_size", [16, 32, 64, 512])
def test_block_sizes(isa: str, dtype: str, block_size: int) -> None:
    make_case(333, block_size=block_size).check(isa, dtype)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 100, 255, 256, 257, 600])
@pytest.mark.parametrize("length", [1, 40, 257, 530])
def test_windows(isa: str, dtype: str, length: int, window: int) -> None:
    make_case(length, window=window, queries=20).check(isa, dtype)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [1, 16, 70, 257])
@pytest.mark.parametrize("length", [60, 290, 530])
def test_keys_before_all_windows_are_not_read(
    isa: str, dtype: str, length: int, window: int, softcap: float
) -> None:
    """They may be gone; only the 16 in which a window begins lie together."""
    case = make_case(length, window=window, softcap=softcap, queries=20)
    expected = case.run(isa, dtype)
    first = max(0, int(case.positions.min()) + 1 - window) // 16 * 16
    case.k[:first] = case.v[:first] = np.nan
    np.testing.assert_array_equal(case.run(isa, dtype), expected)
    assert np.isfinite(expected).all()


@pytest.mark.parametrize("softcap", [1.0, 20.0])
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("length", [1, 40, 257, 530])
def test_soft_caps(isa: str, dtype: str, length: int, window: int, softcap: float) -> None:
    make_case(length, window=window, softcap=softcap, queries=20).check(isa, dtype)


def test_a_real_shape(isa: str, dtype: str) -> None:
    make_case(300, head_dim=64, group=3, queries=10).check(isa, dtype)


def test_a_dominant_key_in_an_early_split_outweighs_later_ones(isa: str, dtype: str) -> None:
    case = make_case(600, queries=2)
    case.k[3] = case.q[0, 0] * 30
    case.check(isa, dtype)
    case.k[590] = case.q[1, 2] * 60
    case.check(isa, dtype)


def test_scores_far_below_the_maximum_weigh_nothing(isa: str, dtype: str) -> None:
    case = make_case(40, head_dim=16, group=1, queries=1)
    case.k[:] = 0.0
    case.k[7] = case.q[0, 0] * 1000
    out = case.run(isa, dtype)
    np.testing.assert_array_equal(out[0, 0], stored(case.v[7:8], dtype)[0])


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("length", [20, 258, 520])
def test_a_query_has_the_same_bits_alone_and_in_a_tile(
    isa: str, dtype: str, length: int, window: int, softcap: float
) -> None:
    case = make_case(length, queries=20, window=window, softcap=softcap)
    together = case.run(isa, dtype)
    for i, position in enumerate(case.positions):
        # As a decode step sees it, when later keys do not exist yet; and with them.
        for visible in (int(position) + 1, length):
            alone = case.at(i, visible).run(isa, dtype)
            np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.parametrize("block_size", [32, 64])
def test_bits_do_not_depend_on_the_block_size(isa: str, dtype: str, block_size: int) -> None:
    case = make_case(300, queries=5)
    other = Case(case.q, case.k, case.v, case.positions, block_size)
    np.testing.assert_array_equal(other.run(isa, dtype), case.run(isa, dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-42])
@pytest.mark.parametrize("part", ["k", "v"])
def test_what_is_not_finite_or_tiny_is_not_lost(
    isa: str, dtype: str, part: str, value: float
) -> None:
    case = make_case(40, queries=2, group=1)
    getattr(case, part)[5] = 0.0
    getattr(case, part)[5, 3] = value
    assert np.isfinite(case.run(isa, dtype)).all() == np.isfinite(value)


@pytest.mark.parametrize("lost", ["k", "v"])
def test_keys_out_of_sight_do_not_matter(isa: str, dtype: str, lost: str) -> None:
    case = make_case(100, queries=3, window=20)
    expected = case.run(isa, dtype)
    getattr(case, lost)[:78] = 1e4
    np.testing.assert_array_equal(case.run(isa, dtype), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_table": np.array([1], np.int32)}, "block_table: got 1"),
        ({"block_table": np.zeros(0, np.int32)}, "block_table: 0 blocks of 16 for 8 keys"),
        ({"block_size": 8}, "block_table: 1 blocks of 8"),
        ({"v": np.zeros((8, 6), np.float32)}, "v: expected"),
        ({"v": np.zeros((7, 4), np.float32)}, "v: expected"),
        ({"dtype": "f16"}, "dtype: got f16"),
    ],
)
def test_wrong_caches_are_refused(
    isa: str, dtype: str, changes: dict[str, object], message: str
) -> None:
    zeros = np.zeros((8, 4), np.float32)
    arguments = {
        "k": zeros, "v": zeros, "block_table": np.zeros(1, np.int32), "dtype": dtype, "isa": isa,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _core.PagedCache(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("shape", "positions", "message"),
    [
        ((1, 1, 4), [8], "positions: got 8, expected 0 to 7"),
        ((1, 1, 4), [-1], "positions: got -1"),
        ((1, 1, 4), [0, 1], "positions: got 2, expected 1"),
        ((1, 1, 6), [0], "q: got"),
        ((1, 0, 4), [0], "q: got"),
        ((0, 1, 4), [], "q: got"),
    ],
)
def test_wrong_queries_are_refused(
    isa: str, dtype: str, shape: tuple[int, ...], positions: list[int], message: str
) -> None:
    zeros = np.zeros((8, 4), np.float32)
    cache = _core.PagedCache(zeros, zeros, np.zeros(1, np.int32), dtype=dtype, isa=isa)
    with pytest.raises(ValueError, match=message):
        cache.attend(np.zeros(shape, np.float32), np.array(positions, np.int32), scale=1.0)
