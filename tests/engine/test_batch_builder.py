from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rapshee_engine.engine.batch_builder import Batch, BatchBuilder
from rapshee_engine.engine.kv_cache import KVGroup
from rapshee_engine.engine.request import Request
from rapshee_engine.engine.scheduler import ScheduledStep, Scheduler
from rapshee_engine.sampling_params import SamplingParams

BLOCK = 4
VOCAB = 70


class Bench:
    """A scheduler and a builder."""

    def __init__(self, windows: Sequence[int] = (0,), **options: Any) -> None:
        sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16, **options}
        groups = [KVGroup(64, window) for window in windows]
        self.scheduler = Scheduler(kv_groups=groups, block_size=BLOCK, **sizes)
        self.builder = BatchBuilder(
            vocab_size=VOCAB,
            block_size=BLOCK,
            num_kv_groups=len(groups),
            max_num_seqs=4,
            max_blocks_per_seq=32,
            end_token_ids=frozenset({69}),
        )

    def add(self, tokens: Sequence[int], *, max_tokens: int = 8, **options: Any) -> Request:
        seed = options.pop("seed", 0)
        params = SamplingParams(max_tokens=max_tokens, **options)
        request = Request("r", list(tokens), params, max_tokens=max_tokens, seed=seed)
        self.scheduler.add(request)
        return request

    def build(self) -> tuple[ScheduledStep, Batch]:
        step = self.scheduler.schedule()
        assert step is not None
        return step, self.builder.build(step)

    def step(self, token_id: int = 9) -> Batch:
        step, batch = self.build()
        self.scheduler.update(step, [token_id if s.samples else None for s in step.sequences])
        return batch


def test_tables_grow_with_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Bench()
    monkeypatch.setattr("rapshee_engine.engine.batch_builder._FIRST_TABLE_WIDTH", 1)
    narrow = Bench()
    for bench in (wide, narrow):
        bench.add(range(70), max_tokens=20)
        bench.add([3, 4, 5])
    assert narrow.builder._tables.shape[-1] < wide.builder._tables.shape[-1]
    for _ in range(12):
        steps = [bench.step().step_input.as_arguments() for bench in (wide, narrow)]
        assert {k: v.tolist() for k, v in steps[0].items()} == {
            k: v.tolist() for k, v in steps[1].items()
        }


def test_a_prompt_and_its_first_decode() -> None:
    bench = Bench()
    request = bench.add([5, 6, 7, 8, 4, 3], temperature=0.5, top_k=3, seed=77)
    a = bench.step().step_input
    ((first, second),) = request.block_tables
    assert a.token_ids.tolist() == [5, 6, 7, 8, 4, 3]
    assert a.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert a.slot_mapping.tolist() == [
        [first * BLOCK + i for i in range(4)] + [second * BLOCK, second * BLOCK + 1]
    ]
    assert a.query_start_loc.tolist() == [0, 6]
    assert a.seq_lens.tolist() == [6]
    assert a.block_tables.tolist() == [[[first, second] + [-1] * 6]]
    assert a.sample_rows.tolist() == [5]
    assert (a.temperature.tolist(), a.top_k.tolist(), a.seed.tolist()) == ([0.5], [3], [77])
    assert a.draw_index.tolist() == [0]
    a = bench.step().step_input
    assert (a.token_ids.tolist(), a.positions.tolist()) == ([9], [6])
    assert a.slot_mapping.tolist() == [[second * BLOCK + 2]]
    assert (a.seq_lens.tolist(), a.draw_index.tolist()) == ([7], [1])


def test_a_chunk_that_does_not_end_the_prompt_samples_nothing() -> None:
    bench = Bench(max_num_batched_tokens=4)
    bench.add(range(6))
    a = bench.step().step_input
    assert a.sample_rows.tolist() == []
    assert a.bias_indptr.tolist() == [0]
    assert bench.step().step_input.sample_rows.tolist() == [1]


def test_rows_refer_to_tokens_across_sequences() -> None:
    bench = Bench()
    bench.add([1, 2, 3], seed=5)
    bench.add([4], seed=6)
    a = bench.step().step_input
    assert a.token_ids.tolist() == [4, 1, 2, 3]
    assert a.query_start_loc.tolist() == [0, 1, 4]
    assert (a.sample_rows.tolist(), a.seed.tolist()) == ([0, 3], [6, 5])


def test_a_pending_token_names_the_row_that_draws_it() -> None:
    bench = Bench()
    bench.add([1, 2, 3])
    bench.add([4])
    bench.build()
    _, batch = bench.build()
    assert batch.step_input.token_ids.tolist() == [~1, ~0]


def test_tables_are_written_anew_for_a_new_occupant_of_the_slot() -> None:
    bench = Bench()
    bench.add(range(20, 36), max_tokens=1, logit_bias={3: 1.0}, allowed_token_ids=[3])
    bench.step(token_id=3)
    request = bench.add([1, 2], max_tokens=2)
    batch = bench.step()
    assert batch.step_input.block_tables.tolist() == [[[*request.block_tables[0]] + [-1] * 7]]
    assert len(batch.step_input.bias_ids) == 0
    assert batch.masks is None


def test_new_blocks_of_a_running_sequence_are_added() -> None:
    bench = Bench()
    request = bench.add([1, 2, 3], max_tokens=40)
    for _ in range(36):
        batch = bench.step()
    table = batch.step_input.block_tables
    assert table.shape == (1, 1, 16)
    assert table[:, 0, : len(request.block_tables[0])].tolist() == request.block_tables
    assert table.flags.c_contiguous


def test_each_group_has_its_table_and_slots() -> None:
    bench = Bench(windows=(0, 5))
    bench.add([1, 2, 3], max_tokens=2)
    long = bench.add(range(10, 24), max_tokens=4)
    a = bench.step().step_input
    assert a.block_tables.shape == (2, 2, 8)
    for table, slots in zip(a.block_tables, a.slot_mapping, strict=True):
        expected = [table[0, i // BLOCK] * BLOCK + i % BLOCK for i in range(3)]
        expected += [table[1, i // BLOCK] * BLOCK + i % BLOCK for i in range(13)]
        assert slots.tolist() == expected
    a = bench.step().step_input  # the last token of the prompt, at position 13, sees from 9 on
    assert a.block_tables[:, 1, :4].tolist() == long.block_tables
    assert a.block_tables[1, 1, :2].tolist() == [-1, -1]
    assert (a.block_tables[1, 1, 2:4] >= 0).all()
    assert a.block_tables.flags.c_contiguous
    assert a.slot_mapping.flags.c_contiguous


def test_every_field_has_its_dtype_and_is_contiguous() -> None:
    bench = Bench()
    bench.add([1, 2, 3], logit_bias={3: 1.5}, prompt_logprobs=1)
    bench.add([4])
    arrays = bench.step().step_input.as_arguments()
    wide = {"slot_mapping": np.int64, "seed": np.uint64, "draw_index": np.uint32}
    floats = {"temperature", "top_p", "min_p", "bias_values"}
    floats |= {"repetition_penalty", "presence_penalty", "frequency_penalty"}
    for name, array in arrays.items():
        expected = wide.get(name, np.float32 if name in floats else np.int32)
        assert array.dtype == (np.uint8 if name == "needs_mask" else expected), name
        assert array.flags.c_contiguous, name


def test_the_largest_seed_keeps_its_bits() -> None:
    bench = Bench()
    bench.add([1], seed=(1 << 64) - 1)
    assert bench.step().step_input.seed.tolist() == [(1 << 64) - 1]


@pytest.mark.parametrize(("logprobs", "rows"), [(None, 0), (0, 1), (1, 1), (20, 20)])
def test_a_rank_needs_at_least_one_alternative(logprobs: int | None, rows: int) -> None:
    bench = Bench()
    bench.add([1], logprobs=logprobs)
    assert bench.step().step_input.num_logprobs.tolist() == [rows]


def test_penalties_use_the_slot_and_others_none() -> None:
    bench = Bench()
    plain = bench.add([1])
    counted = bench.add([2], presence_penalty=0.5)
    assert plain.slot == counted.slot == -1
    _, batch = bench.build()
    assert batch.step_input.state_slot.tolist() == [-1, counted.slot]
    assert batch.step_input.presence_penalty.tolist() == [0.0, 0.5]


def test_biases_are_rows_of_a_sparse_matrix() -> None:
    bench = Bench()
    bench.add([1], logit_bias={3: 1.5, 5: -2.0})
    bench.add([2])
    bench.add([3], logit_bias={7: 0.5})
    a = bench.step().step_input
    assert a.bias_indptr.tolist() == [0, 2, 2, 3]
    assert a.bias_ids.tolist() == [3, 5, 7]
    assert a.bias_values.tolist() == [1.5, -2.0, 0.5]


def test_prompt_rows_score_the_next_token_and_the_last_one_draws() -> None:
    bench = Bench(max_num_batched_tokens=3)
    bench.add([5, 6, 7, 8], prompt_logprobs=2, temperature=0.5, presence_penalty=0.5)
    a = bench.step().step_input
    assert (a.sample_rows.tolist(), a.target_ids.tolist()) == ([0, 1, 2], [6, 7, 8])
    assert a.num_logprobs.tolist() == [2, 2, 2]
    assert a.temperature.tolist() == [0.0, 0.0, 0.0]
    assert a.state_slot.tolist() == [-1, -1, -1]
    a = bench.step().step_input
    assert (a.sample_rows.tolist(), a.target_ids.tolist()) == ([0], [-1])
    assert (a.num_logprobs.tolist(), a.temperature.tolist()) == ([0], [0.5])


def allowed(words: Any) -> set[int]:
    return {t for t in range(len(words) * 32) if words[t // 32] >> (t % 32) & 1}


def test_masks_allow_what_was_asked_for() -> None:
    bench = Bench()
    bench.add([1])
    bench.add([2], allowed_token_ids=[0, 31, 32, 69])
    batch = bench.step()
    assert batch.step_input.needs_mask.tolist() == [0, 1]
    assert batch.masks is not None
    assert (batch.masks.shape, batch.masks.dtype) == ((1, 3), np.uint32)
    assert allowed(batch.masks[0].tolist()) == {0, 31, 32, 69}


def test_ends_are_masked_until_min_tokens() -> None:
    bench = Bench()
    bench.add([2], allowed_token_ids=[0, 69], min_tokens=1)
    bench.add([3], min_tokens=2, ignore_eos=True)
    batch = bench.step()
    assert batch.masks is not None
    assert [allowed(m.tolist()) for m in batch.masks] == [{0}, set(range(69))]
    batch = bench.step()
    assert batch.masks is not None
    assert [allowed(m.tolist()) for m in batch.masks] == [{0, 69}, set(range(69))]
    batch = bench.step()
    assert batch.step_input.needs_mask.tolist() == [1, 0]
