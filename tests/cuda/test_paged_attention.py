"""Decode and prefill attention of CUDA against numpy, and against each other bit by bit. The cache
holds NaN wherever nothing was written, so each result also shows that nothing stale was read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops
from reference.attention import attention
from reference.quant import round_trip

# Weights are rounded to halves, by 2^-8 (f16: 2^-11) of their size at most (some up, their sum
# down), then the output. A tenth more for the float errors of scores, which exp makes relative.
RELATIVE_ERROR = {"bf16": 1.1 * 3 * 2.0**-8, "f16": 1.1 * 3 * 2.0**-11}
# Weights of f16 below 2^-14 are rounded to multiples of 2^-24.
ABSOLUTE_ERROR = {"bf16": 1e-7, "f16": 1e-4}

SPLIT = 256
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 258, 511, 512, 513, 700]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Model:
    """What all sequences of a cache share."""

    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 16
    block_size: int = 16
    half: str = "bf16"
    window: int = 0
    softcap: float = 0.0

    @property
    def options(self) -> dict[str, float]:
        scale = self.head_dim**-0.5
        return {"scale": scale, "window": self.window, "softcap": self.softcap}


@dataclass(frozen=True)
class Sequence:
    """Queries, keys and values of all positions: [length, heads or kv_heads, head_dim]."""

    q: Floats
    k: Floats
    v: Floats

    @property
    def length(self) -> int:
        return len(self.k)

    def upto(self, length: int) -> Sequence:
        return Sequence(self.q[:length], self.k[:length], self.v[:length])

    def expected(self, m: Model, positions: Ints) -> tuple[npt.NDArray[np.float64], ...]:
        """Outputs and magnitudes [len(positions), heads, head_dim]."""
        group = m.heads // m.kv_heads
        q, k, v = (round_trip(a, m.half) for a in (self.q, self.k, self.v))
        parts = [
            attention(
                q[positions, h * group : (h + 1) * group], k[:, h], v[:, h], positions, **m.options
            )
            for h in range(m.kv_heads)
        ]
        return tuple(np.concatenate(each, axis=1) for each in zip(*parts, strict=True))


def draw(m: Model, length: int, seed: int = 0) -> Sequence:
    random = np.random.default_rng((length, m.head_dim, seed))
    q, k, v = (
        random.standard_normal((length, n, m.head_dim)).astype(np.float32) * 2
        for n in (m.heads, m.kv_heads, m.kv_heads)
    )
    return Sequence(q, k, v)


@dataclass
class Cached:
    """Sequences in shuffled blocks of one cache, with two blocks that are nobody's."""

    model: Model
    sequences: list[Sequence]
    tables: Ints = field(init=False)

    def __post_init__(self) -> None:
        m = self.model
        blocks = [-(-s.length // m.block_size) for s in self.sequences]
        ids = np.random.default_rng(1).permutation(sum(blocks) + 2).astype(np.int32)
        self.tables = np.full((len(blocks), max(blocks)), -1, np.int32)
        self.cache = cuda_ops.PagedCache(len(ids), m.block_size, m.kv_heads, m.head_dim, m.half)
        first = 0
        for table, sequence, count in zip(self.tables, self.sequences, blocks, strict=True):
            table[:count] = ids[first : first + count]
            first += count
            at = np.arange(sequence.length)
            slots = table[at // m.block_size].astype(np.int64) * m.block_size + at % m.block_size
            kv = np.concatenate([sequence.k, sequence.v], axis=1)
            unrotated = np.zeros((sequence.length, 0), np.float32)
            self.cache.write(kv.reshape(1, sequence.length, -1), slots, unrotated, unrotated)

    def decode(self, lengths: list[int] | None = None, **changes: int) -> Floats:
        """Of the last position of each sequence, or of its first ``lengths`` tokens."""
        lens = [s.length for s in self.sequences] if lengths is None else lengths
        q = np.stack([s.q[max(n, 1) - 1] for s, n in zip(self.sequences, lens, strict=True)])
        seq_lens = np.array(lens, np.int32)
        options = {**self.model.options, **changes}
        return self.cache.decode(q, seq_lens, self.tables, **options)

    def prefill(self, ranges: list[tuple[int, int]], later: bool = False) -> list[Floats]:
        """Of positions begin to end of each sequence. ``later``: keys from end on are there."""
        q = np.concatenate([s.q[slice(*r)] for s, r in zip(self.sequences, ranges, strict=True)])
        positions = np.concatenate([np.arange(*r, dtype=np.int32) for r in ranges])
        starts = np.cumsum([0] + [end - begin for begin, end in ranges]).astype(np.int32)
        seq_lens = np.array([s.length for s in self.sequences], np.int32) if later else None
        out = self.cache.prefill(
            q, starts, positions, self.tables, seq_lens=seq_lens, **self.model.options
        )
        return np.split(out, starts[1:-1])


def assert_close(m: Model, sequence: Sequence, positions: list[int], out: Floats) -> None:
    expected, magnitude = sequence.expected(m, np.array(positions, np.int32))
    allowed = RELATIVE_ERROR[m.half] * magnitude + ABSOLUTE_ERROR[m.half]
    excess = np.abs(out - expected) - allowed
    assert (excess <= 0).all(), f"off by {excess.max()} more than allowed"


def check(m: Model, lengths: list[int], queries: int = 4) -> None:
    """Decode of the last position of sequences, and prefill of the last ``queries``."""
    cached = Cached(m, [draw(m, n) for n in lengths])
    decoded = cached.decode()
    prefilled = cached.prefill([(max(n - queries, 0), n) for n in lengths])
    for sequence, one, some in zip(cached.sequences, decoded, prefilled, strict=True):
        n = sequence.length
        assert_close(m, sequence, list(range(max(n - queries, 0), n)), some)
        np.testing.assert_array_equal(one, some[-1])


@pytest.mark.parametrize("half", ["bf16", "f16"])
def test_lengths_around_tiles_blocks_and_splits(half: str) -> None:
    check(Model(half=half), LENGTHS)


@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 80, 128, 136, 256])
def test_head_sizes(head_dim: int) -> None:
    check(Model(head_dim=head_dim, heads=2), [83, 290])


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 15, 16, 17, 33, 130])
def test_groups(group: int) -> None:
    check(Model(heads=2 * group, kv_heads=2, head_dim=8), [50, 270], queries=5)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 100, 255, 256, 257, 600])
def test_windows(window: int) -> None:
    check(Model(window=window), [1, 40, 257, 530], queries=20)


def test_soft_cap() -> None:
    check(Model(softcap=3.0, half="f16"), [1, 70, 300])
    check(Model(softcap=3.0, window=33, head_dim=64), [100], queries=40)


def test_a_real_shape() -> None:
    check(Model(heads=8, kv_heads=2, head_dim=128, block_size=64), [300], queries=40)


def test_f16_of_every_padded_head_size() -> None:
    for head_dim in (64, 128, 256):
        check(Model(heads=2, head_dim=head_dim, half="f16"), [70], queries=2)


def test_a_dominant_key_in_an_early_split_outweighs_later_ones() -> None:
    m = Model()
    sequence = draw(m, 600)
    sequence.k[3, 0] = sequence.q[599, 0] * 30
    sequence.k[590, 0] = sequence.q[599, 2] * 60
    assert_close(m, sequence, [599], Cached(m, [sequence]).decode())


def test_scores_far_below_the_maximum_weigh_nothing() -> None:
    m = Model(heads=1)
    sequence = draw(m, 40)
    sequence.k[:] = 0.0
    sequence.k[7] = sequence.q[39] * 1000
    np.testing.assert_array_equal(
        Cached(m, [sequence]).decode()[0, 0], round_trip(sequence.v[7, 0], m.half)
    )


@pytest.mark.parametrize(
    ("head_dim", "window", "softcap"), [(16, 0, 0.0), (16, 70, 0.0), (72, 0, 2.0), (136, 300, 0.0)]
)
def test_a_row_has_the_same_bits_in_decode_and_in_any_chunk(
    head_dim: int, window: int, softcap: float
) -> None:
    m = Model(head_dim=head_dim, window=window, softcap=softcap)
    length = 330
    sequence = draw(m, length)
    cached = Cached(m, [sequence])
    (whole,) = cached.prefill([(0, length)])
    for begin, end in [(0, 1), (1, 44), (44, 300), (300, 317), (317, 330)]:
        for later in (False, True):
            (chunk,) = cached.prefill([(begin, end)], later)
            np.testing.assert_array_equal(chunk, whole[begin:end])
    for n in (1, 16, 64, 65, 256, 257, 330):
        # Keys from n on: in the cache but not in the sequence, and not in the cache.
        for decoded in (cached.decode([n]), Cached(m, [sequence.upto(n)]).decode()):
            np.testing.assert_array_equal(decoded[0], whole[n - 1])


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    m = Model(heads=4, kv_heads=2)
    lengths = [5, 600, 64, 0, 300, 257]
    sequences = [draw(m, max(n, 1), seed) for seed, n in enumerate(lengths)]
    together = Cached(m, sequences)
    decoded = together.decode(lengths)
    roomy = together.decode(lengths, room=50)
    prefilled = together.prefill([(n // 2, n) for n in lengths])
    for s, n in enumerate(lengths):
        np.testing.assert_array_equal(roomy[s], decoded[s])
        if n == 0:  # padding: untouched
            assert np.isnan(decoded[s]).all()
            continue
        alone = Cached(m, [sequences[s]])
        np.testing.assert_array_equal(alone.decode()[0], decoded[s])
        np.testing.assert_array_equal(alone.prefill([(n // 2, n)])[0], prefilled[s])
        np.testing.assert_array_equal(prefilled[s][-1], decoded[s])


def test_splits_are_merged_in_the_same_order_everywhere() -> None:
    # Keys repeat from split to split and values nearly cancel between them: what is left of a sum
    # of four is rounding, which the order decides.
    m = Model(heads=2, head_dim=8)
    sequence = draw(m, 4 * SPLIT)
    for split in range(1, 4):
        sequence.k[split * SPLIT : (split + 1) * SPLIT] = sequence.k[:SPLIT]
    sequence.v[2 * SPLIT :] = -sequence.v[: 2 * SPLIT]
    cached = Cached(m, [sequence])
    (prefilled,) = cached.prefill([(4 * SPLIT - 1, 4 * SPLIT)])
    np.testing.assert_array_equal(cached.decode(), prefilled)
    assert np.abs(prefilled).max() < 1e-3  # they did cancel


def test_heads_have_the_same_bits_in_any_group() -> None:
    m = Model(heads=20)
    sequence = draw(m, 300)
    all_heads = Cached(m, [sequence]).decode()
    for head in (0, 15, 16, 19):
        one = Sequence(sequence.q[:, head : head + 1].copy(), sequence.k, sequence.v)
        alone = Cached(replace(m, heads=1), [one]).decode()
        np.testing.assert_array_equal(alone[0, 0], all_heads[0, head])


@pytest.mark.parametrize("block_size", [32, 48, 64, 512])
def test_bits_do_not_depend_on_the_block_size(block_size: int) -> None:
    m = Model(head_dim=64)
    sequence = draw(m, 300)
    some, other = (Cached(replace(m, block_size=b), [sequence]) for b in (16, block_size))
    np.testing.assert_array_equal(some.decode(), other.decode())
    np.testing.assert_array_equal(some.prefill([(200, 300)])[0], other.prefill([(200, 300)])[0])


@pytest.mark.parametrize("lost", ["k", "v"])
def test_keys_out_of_sight_do_not_matter(lost: str) -> None:
    m = Model(window=20)
    sequence = draw(m, 400)
    expected = Cached(m, [sequence]).prefill([(300, 310)], later=True)[0]
    getattr(sequence, lost)[:281] = 1e4
    getattr(sequence, lost)[310:] = -1e4
    changed = Cached(m, [sequence])
    np.testing.assert_array_equal(changed.prefill([(300, 310)], later=True)[0], expected)
    np.testing.assert_array_equal(changed.decode([310])[0], expected[-1])


def test_work_beyond_the_grid_is_walked() -> None:
    # 420 units of one tile each: more than any grid of the kernel.
    m = Model(heads=4, kv_heads=4, head_dim=8)
    sequence = draw(m, 3)
    cached = Cached(m, [sequence] * 105)
    out = cached.decode()
    np.testing.assert_array_equal(out, np.broadcast_to(out[0], out.shape))
    assert_close(m, sequence, [2], out[:1])


def test_a_launch_leaves_the_workspace_ready_for_the_next() -> None:
    cached = Cached(Model(heads=2, head_dim=8), [draw(Model(heads=2, head_dim=8), 300)])
    out, microseconds = cached.decode(repeats=2)
    np.testing.assert_array_equal(out, cached.decode())
    assert microseconds.shape == (2,)


def test_a_cache_of_random_keys_and_values() -> None:
    cache = cuda_ops.PagedCache(3, 16, 2, 16)
    cache.fill_random(5)
    k, v = cache.read()
    for values in (k, v):
        assert np.abs(values).max() < 0.31  # sqrt(3 / 32)
        assert abs(values.std() - 0.177) < 0.01
        assert abs(values.mean()) < 0.02
    assert (k != v).mean() > 0.9
    again = cuda_ops.PagedCache(3, 16, 2, 16)
    again.fill_random(5)
    np.testing.assert_array_equal(again.read(), [k, v])
    with pytest.raises(ValueError, match="fill_random: got 256 bytes"):
        cuda_ops.PagedCache(1, 16, 1, 8).fill_random(0)


def test_decode_plan() -> None:
    lens = np.array([1, 0, 256, 257, 600], np.int32)
    items, first, splits = cuda_ops.plan_decode(lens)
    assert items.tolist() == [[0, 0], [2, 0], [3, 0], [3, 1], [4, 0], [4, 1], [4, 2]]
    assert first.tolist() == [0, 1, 1, 2, 4]
    assert splits.tolist() == [1, 0, 1, 2, 3]
    items, first, splits = cuda_ops.plan_decode(lens, window=89)
    assert items.tolist() == [[0, 0], [2, 0], [3, 0], [3, 1], [4, 1], [4, 2]]
    assert splits.tolist() == [1, 0, 1, 2, 2]
    # The window's first key is the first of a split, and the last of the one before.
    assert cuda_ops.plan_decode(lens[4:], window=88)[0].tolist() == [[0, 2]]


def test_prefill_plan() -> None:
    starts = np.array([0, 1, 2, 2, 7, 17], np.int32)
    assert cuda_ops.num_decode_seqs(starts) == 3
    assert cuda_ops.num_decode_seqs(starts[:4]) == 3
    assert cuda_ops.num_decode_seqs(starts[:1]) == 0
    positions = np.concatenate([[9, 4], np.arange(5), np.arange(6, 16)]).astype(np.int32)
    tiles = cuda_ops.plan_prefill(starts, positions, first_seq=3, tile_tokens=4)
    # Last positions 15, 13, 9 of the last sequence, 4 and 3 of the one before.
    assert tiles.tolist() == [[4, 15], [4, 11], [4, 7], [3, 6], [3, 2]]
    assert cuda_ops.plan_prefill(starts, positions, first_seq=5, tile_tokens=4).size == 0


def test_prefill_tiles_hold_the_rows_of_a_block() -> None:
    assert cuda_ops.prefill_tile_tokens(32, 8, 128) == 32
    assert cuda_ops.prefill_tile_tokens(8, 8, 256) == 64
    assert cuda_ops.prefill_tile_tokens(300, 1, 64) == 1


@pytest.mark.parametrize(
    ("sizes", "heads", "options", "message"),
    [
        ((16, 1, 12), 1, {}, "head_dim: got 12, expected a multiple of 8 up to 256"),
        ((16, 1, 264), 1, {}, "head_dim: got 264"),
        ((24, 1, 8), 1, {}, "block_size: got 24, expected a multiple of 16"),
        ((16, 2, 8), 3, {}, "3"),
        ((16, 1, 8), 1, {"scale": 0.0}, "scale: got 0"),
        ((16, 1, 8), 1, {"softcap": -1.0}, "softcap: -1"),
        ((16, 1, 8), 1, {"window": -1}, "window: -1"),
    ],
)
def test_what_no_kernel_takes_is_refused(
    sizes: tuple[int, int, int], heads: int, options: dict[str, float], message: str
) -> None:
    cache = cuda_ops.PagedCache(1, *sizes)
    q = np.zeros((1, heads, sizes[2]), np.float32)
    one, table = np.ones(1, np.int32), np.zeros((1, 1), np.int32)
    options = {"scale": 1.0, **options}
    with pytest.raises(ValueError, match=message):
        cache.decode(q, one, table, **options)
    with pytest.raises(ValueError, match=message):
        cache.prefill(q, np.array([0, 1], np.int32), one * 0, table, **options)


def test_wrong_arguments_are_refused() -> None:
    cache = cuda_ops.PagedCache(2, 16, 1, 8)
    q, table = np.zeros((1, 1, 8), np.float32), np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match="half: got 'f32'"):
        cuda_ops.PagedCache(1, 16, 1, 8, "f32")
    with pytest.raises(ValueError, match="sizes of the cache: got 0"):
        cuda_ops.PagedCache(0, 16, 1, 8)
    with pytest.raises(ValueError, match="seq_lens: got 17, expected 0 to 16"):
        cache.decode(q, np.array([17], np.int32), table, scale=1.0)
    with pytest.raises(ValueError, match="block_tables: got 2, expected 0 to 1"):
        cache.decode(q, np.array([1], np.int32), table + 2, scale=1.0)
    with pytest.raises(ValueError, match="query_start_loc: expected 0 up to 1"):
        cache.prefill(q, np.array([0, 2], np.int32), np.zeros(1, np.int32), table, scale=1.0)
