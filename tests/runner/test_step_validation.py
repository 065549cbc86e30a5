"""Every field of a step, wrong in every way: refused by name, and the runner goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rapshee_engine import _core
from reference.steps import Chunk, StepArrays, make_runner, make_step
from reference.tiny_llama import make_config, make_weights, write_hf_folder

VOCAB = 160
WINDOW = 12  # of the second of two layers
BOTH = (0, 0)  # both groups of layers have all blocks
# Two sequences: a decode row at position 16, and a prompt of five whose last token draws.
CHUNKS = [
    Chunk([7], 16, [3, 5], dropped=BOTH),
    Chunk([1, 2, 3, 4, 5], 0, [2], dropped=BOTH),
]
FIELDS = sorted(make_step(CHUNKS))
FLAT_FIELDS = [name for name in FIELDS if name not in ("block_tables", "slot_mapping")]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_core.ModelRunner]:
    config = make_config(
        model_type="qwen3",
        max_position_embeddings=40,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"],
    )
    folder = write_hf_folder(tmp_path_factory.mktemp("tiny"), config, make_weights(config, seed=1))
    runner = make_runner(folder, num_blocks=8, max_num_tokens=12, max_num_seqs=3)
    yield runner
    runner.close()


def assert_refused(runner: _core.ModelRunner, step: StepArrays, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runner.launch(**step)
    out = runner.collect(runner.launch(**make_step(CHUNKS)))
    assert out.token_ids.shape == (2,)


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_dtypes(runner: _core.ModelRunner, name: str) -> None:
    step = make_step(CHUNKS)
    narrow = {np.dtype(np.int32): np.int64, np.dtype(np.float32): np.float64}
    wrong = narrow.get(step[name].dtype, np.int32)
    assert_refused(runner, step | {name: step[name].astype(wrong)}, f"{name}: got dtype")


@pytest.mark.parametrize("name", FIELDS)
def test_other_byte_order(runner: _core.ModelRunner, name: str) -> None:
    step = make_step(CHUNKS)
    swapped = step[name].astype(step[name].dtype.newbyteorder())
    if step[name].dtype.itemsize > 1:
        assert_refused(runner, step | {name: swapped}, f"{name}: got dtype")
    else:
        assert swapped.dtype == step[name].dtype


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_dimensions(runner: _core.ModelRunner, name: str) -> None:
    step = make_step(CHUNKS)
    assert_refused(runner, step | {name: step[name][None]}, f"{name}: got . dimensions")


@pytest.mark.parametrize("name", FIELDS)
def test_strided_arrays(runner: _core.ModelRunner, name: str) -> None:
    step = make_step(CHUNKS)
    # Two elements at least: shorter arrays are contiguous whatever their strides.
    strided = np.zeros((*step[name].shape[:-1], 8), step[name].dtype)[..., ::4]
    assert_refused(runner, step | {name: strided}, f"{name}: expected a C-contiguous array")


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_not_an_array(runner: _core.ModelRunner, name: str) -> None:
    step: dict[str, Any] = make_step(CHUNKS)
    for value in (step[name].tolist(), None, 1, memoryview(step[name])):
        assert_refused(runner, step | {name: value}, f"{name}: got .* expected a numpy array")


@pytest.mark.parametrize("name", FLAT_FIELDS)
def test_wrong_lengths(runner: _core.ModelRunner, name: str) -> None:
    step = make_step(CHUNKS)
    # What the length of these says is checked through the arrays that must match it.
    named = {
        "token_ids": "positions", "seq_lens": "query_start_loc", "sample_rows": "target_ids",
        "bias_ids": "bias_values",
    }.get(name, name)  # fmt: skip
    longer = np.concatenate([step[name], np.zeros(1, step[name].dtype)])
    assert_refused(runner, step | {name: longer}, f"{named}: got")


def test_missing_and_unknown_fields(runner: _core.ModelRunner) -> None:
    for name in FIELDS:
        step = make_step(CHUNKS)
        del step[name]
        assert_refused(runner, step, f"{name}: missing")
    assert_refused(runner, make_step(CHUNKS, adapter=np.zeros(2, np.int32)), "got 24 arrays")


WRONG_ELEMENTS = [
    ("token_ids", 0, [VOCAB, 2**31 - 1, -4, -(2**31)]),
    ("positions", 0, [-1, 0, 15, 17, 2**31 - 1]),
    ("positions", 2, [0, 2]),
    ("slot_mapping", (0, 0), [-2, 0, 5 * 16 + 1, 3 * 16, 8 * 16, 2**62]),
    ("slot_mapping", (1, 0), [-2, 5 * 16 + 1, 8 * 16]),
    ("query_start_loc", 0, [-1, 1]),
    ("query_start_loc", 1, [0, -5, 6, 7]),
    ("query_start_loc", 2, [5, 7]),
    ("seq_lens", 0, [0, -1, 16, 18, 41, 2**31 - 1]),
    ("block_tables", (0, 0, 0), [-1, 8, 2**31 - 1]),
    ("block_tables", (0, 1, 0), [-1, 8]),
    ("block_tables", (1, 0, 0), [-1, 8]),
    ("block_tables", (1, 0, 1), [-1, 8]),
    ("sample_rows", 1, [-1, 6]),
    ("target_ids", 1, [-2, VOCAB]),
    ("temperature", 0, [-0.1, np.nan, np.inf]),
    ("top_k", 0, [-1]),
    ("top_p", 0, [0.0, -1.0, 1.1, np.nan]),
    ("min_p", 0, [-0.1, 1.1, np.nan]),
    ("repetition_penalty", 0, [0.0, -1.0, np.nan, np.inf]),
    ("presence_penalty", 0, [np.nan, np.inf]),
    ("frequency_penalty", 0, [np.nan, -np.inf]),
    ("num_logprobs", 0, [-1, VOCAB + 1]),
    ("state_slot", 0, [-2, 3]),
    ("bias_indptr", 0, [-1, 1]),
    ("bias_indptr", 1, [-1, 2]),
    ("bias_indptr", 2, [0, 2]),
    ("bias_ids", 0, [-1, VOCAB]),
    ("bias_values", 0, [np.nan, np.inf]),
]
BIASES = {
    "bias_indptr": np.array([0, 1, 1], np.int32),
    "bias_ids": np.array([9], np.int32),
    "bias_values": np.array([1.0], np.float32),
}


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [(name, index, value) for name, index, values in WRONG_ELEMENTS for value in values],
)
def test_elements_out_of_range(
    runner: _core.ModelRunner, name: str, index: Any, value: float
) -> None:
    step = make_step(CHUNKS, **{key: array.copy() for key, array in BIASES.items()})
    step[name][index] = value
    # A length that contradicts the positions may be noticed there first.
    named = f"({name}|positions)" if name in ("seq_lens", "query_start_loc") else name
    assert_refused(runner, step, f"^{named}")


def test_any_mask_flag_but_zero_asks_for_a_mask(runner: _core.ModelRunner) -> None:
    ticket = runner.launch(**make_step(CHUNKS, needs_mask=np.array([0, 255], np.uint8)))
    with pytest.raises(ValueError, match="waits for set_masks"):
        runner.collect(ticket)
    runner.set_masks(ticket, np.full((1, VOCAB // 32), 2**32 - 1, np.uint32))
    assert (runner.collect(ticket).token_ids >= 0).all()


def test_steps_without_tokens_or_sequences(runner: _core.ModelRunner) -> None:
    step = make_step(CHUNKS)
    for name, array in step.items():
        step[name] = array[:, :0].copy() if array.ndim > 1 else array[:0]
    step["query_start_loc"] = step["bias_indptr"] = np.zeros(1, np.int32)
    assert_refused(runner, step, "token_ids: got 0 tokens, expected 1 to 12")


def test_more_tokens_or_sequences_than_fit(runner: _core.ModelRunner) -> None:
    many = [Chunk([1], 0, [i], dropped=BOTH) for i in range(4)]
    assert_refused(runner, make_step(many), "seq_lens: got 4 sequences, expected 1 to 3")
    long = [Chunk([1] * 13, 0, [0], dropped=BOTH)]
    assert_refused(runner, make_step(long), "token_ids: got 13 tokens, expected 1 to 12")


def test_long_sequences_come_last(runner: _core.ModelRunner) -> None:
    assert_refused(runner, make_step(CHUNKS[::-1]), "query_start_loc: sequence 1 of one token")


def test_a_context_beyond_the_models(runner: _core.ModelRunner) -> None:
    step = make_step([Chunk([1], 40, [0, 1, 2], dropped=BOTH)])
    assert_refused(runner, step, r"seq_lens\[0\]: got 41, expected 1 to 40")


def test_a_table_too_narrow_for_the_length(runner: _core.ModelRunner) -> None:
    step = make_step(CHUNKS)
    step["block_tables"] = step["block_tables"][..., :1].copy()
    assert_refused(runner, step, r"seq_lens\[0\]: got 17, expected 1 to 16")
    step["block_tables"] = step["block_tables"][..., :0].copy()
    assert_refused(runner, step, r"seq_lens\[0\]: got 17, expected 1 to 0")


def test_tables_for_another_number_of_sequences(runner: _core.ModelRunner) -> None:
    step = make_step(CHUNKS)
    step["block_tables"] = step["block_tables"][:, :1].copy()
    assert_refused(runner, step, "block_tables: got 4 elements, expected 8")


def test_tables_and_slots_of_another_number_of_groups(runner: _core.ModelRunner) -> None:
    one = make_step([Chunk(c.token_ids, c.start, c.blocks) for c in CHUNKS])
    assert_refused(runner, one, "block_tables: got 1 groups of layers, expected 2")
    step = make_step(CHUNKS)
    assert_refused(
        runner, step | {"slot_mapping": one["slot_mapping"]}, "slot_mapping: got 1 groups of layers"
    )


@pytest.mark.parametrize(("start", "dropped"), [(26, 0), (27, 1), (28, 1), (39, 1)])
def test_blocks_may_be_gone_that_no_window_reaches(
    runner: _core.ModelRunner, start: int, dropped: int
) -> None:
    chunk = Chunk([7], start, [3, 5, 1], dropped=(0, dropped))
    assert runner.collect(runner.launch(**make_step([chunk]))).token_ids[0] >= 0
    too_many = Chunk([7], start, [3, 5, 1], dropped=(0, dropped + 1))
    assert_refused(runner, make_step([too_many]), rf"block_tables\[1, 0, {dropped}\]: got -1")
    with_full = Chunk([7], start, [3, 5, 1], dropped=(1, dropped))
    assert_refused(runner, make_step([with_full]), r"block_tables\[0, 0, 0\]: got -1")


def test_the_first_token_of_a_chunk_sees_furthest_back(runner: _core.ModelRunner) -> None:
    for start, is_gone in ((26, False), (27, True)):
        step = make_step([Chunk(range(5), start, [3, 5, 1], dropped=(0, 1))])
        if is_gone:
            runner.collect(runner.launch(**step))
        else:
            assert_refused(runner, step, r"block_tables\[1, 0, 0\]: got -1, expected 0 to 7")


def test_a_table_without_rows_whose_size_overflows(runner: _core.ModelRunner) -> None:
    step = make_step(CHUNKS)
    step["seq_lens"] = np.ones(16, np.int32)
    step["query_start_loc"] = np.arange(17, dtype=np.int32)
    step["slot_mapping"] = np.zeros((2, 6), np.int64)
    step["block_tables"] = np.empty((2, 0, 2**59), np.int32)  # 2 * 16 * 2^59 is 0 in 64 bits
    assert_refused(runner, step, "block_tables: got 576460752303423488 columns")


def test_a_state_slot_draws_once_a_step(runner: _core.ModelRunner) -> None:
    step = make_step(CHUNKS, state_slot=np.array([1, 1], np.int32))
    assert_refused(runner, step, r"state_slot\[1\]: slot 1 draws twice")
    scored = np.array([5, -1], np.int32)
    ticket = runner.launch(**(step | {"target_ids": scored}))
    assert runner.collect(ticket).token_ids[0] == 5


def test_states_are_checked(runner: _core.ModelRunner) -> None:
    ids = np.array([1, 2], np.int32)
    for slot in (-1, 3):
        with pytest.raises(ValueError, match=f"slot: got {slot}"):
            runner.set_state(slot, ids, 1)
    for count in (-1, 3):
        with pytest.raises(ValueError, match=f"num_prompt_tokens: got {count} of 2"):
            runner.set_state(0, ids, count)
    for token in (-1, VOCAB):
        with pytest.raises(ValueError, match=f"token_ids: got {token}"):
            runner.set_state(0, np.array([token], np.int32), 0)
    with pytest.raises(ValueError, match="token_ids: got dtype int64"):
        runner.set_state(0, ids.astype(np.int64), 1)


def test_masks_are_checked(runner: _core.ModelRunner) -> None:
    ticket = runner.launch(**make_step(CHUNKS, needs_mask=np.array([1, 0], np.uint8)))
    words = VOCAB // 32
    for wrong, message in [
        (np.zeros((1, words + 1), np.uint32), "masks: got 6 words a row, expected 5"),
        (np.zeros((2, words), np.uint32), "masks: got 10 words, expected 5"),
        (np.zeros((1, words), np.int32), "masks: got dtype int32"),
        (np.zeros(words, np.uint32), "masks: got 1 dimensions"),
    ]:
        with pytest.raises(ValueError, match=message):
            runner.set_masks(ticket, wrong)
    with pytest.raises(ValueError, match="is not outstanding"):
        runner.set_masks(ticket + 1, np.zeros((1, words), np.uint32))
    allowed = np.zeros((1, words), np.uint32)
    allowed[0, 2] = 1 << 9
    runner.set_masks(ticket, allowed)
    with pytest.raises(ValueError, match="needs none, or has them"):
        runner.set_masks(ticket, allowed)
    assert runner.collect(ticket).token_ids[0] == 2 * 32 + 9
