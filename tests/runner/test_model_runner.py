"""The native runner as its caller sees it: tickets, chained samples, states, closing, loading."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from rapshee_engine import _core
from rapshee_engine.weights.loader import load_checkpoint
from reference.devices import native_dtype
from reference.llama import forward
from reference.steps import Chunk, StepArrays, make_runner, make_step, native_config
from reference.tiny_llama import (
    make_config,
    make_weights,
    stored_weights,
    write_gguf_file,
    write_hf_folder,
)

CONFIG = make_config()
WEIGHTS = make_weights(CONFIG, seed=2)
PROMPT = [5, 80, 33, 159, 0, 12, 7, 7, 64, 100]

# Error bound of a log-probability in float32, and with weights, activations and cache in bfloat16.
TOLERANCES = {"f32": 1e-4, "bf16": 0.1}

MakeRunner = Callable[..., _core.ModelRunner]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("tiny"), CONFIG, WEIGHTS)


@pytest.fixture(scope="module")
def make(folder: Path, device: str) -> MakeRunner:
    """Makes runners of the tiny model on each device."""
    return partial(make_runner, folder, device=device)


@pytest.fixture
def runner(make: MakeRunner) -> Iterator[_core.ModelRunner]:
    runner = make()
    yield runner
    runner.close()


def run(runner: _core.ModelRunner, step: StepArrays) -> _core.StepOutput:
    return runner.collect(runner.launch(**step))


def prefill(**options: int) -> StepArrays:
    return make_step([Chunk(PROMPT, 0, [4, 2])], **options)


def decode(token: int, position: int = len(PROMPT), **options: int) -> StepArrays:
    return make_step([Chunk([token], position, [4, 2])], **options)


def greedy(runner: _core.ModelRunner, count: int) -> list[int]:
    tokens = [int(run(runner, prefill()).token_ids[0])]
    for i in range(count - 1):
        tokens.append(int(run(runner, decode(tokens[-1], len(PROMPT) + i)).token_ids[0]))
    return tokens


def launch_masked(runner: _core.ModelRunner) -> int:
    step = prefill()
    step["needs_mask"] = np.ones(1, np.uint8)
    return runner.launch(**step)


# The forward pass


def all_logprobs(runner: _core.ModelRunner) -> tuple[np.ndarray, _core.StepOutput]:
    """[T, V] log-probabilities after each token of the prompt, and what else scoring token 1
    gives."""
    targets = [1] * len(PROMPT)
    step = make_step([Chunk(PROMPT, 0, [4], targets=targets)], num_logprobs=160)
    out = run(runner, step)
    logprobs = np.empty((len(PROMPT), 160))
    np.put_along_axis(logprobs, out.top_ids.astype(np.intp), out.top_logprobs, axis=1)
    return logprobs, out


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_log_probabilities_are_those_of_the_formulas(
    tmp_path: Path, kernels: str, model_type: str
) -> None:
    config = make_config(model_type=model_type, head_dim=16)
    weights, dtype = make_weights(config, seed=2), native_dtype(kernels)
    runner = make_runner(write_hf_folder(tmp_path, config, weights, dtype), device=kernels)
    actual, out = all_logprobs(runner)
    runner.close()
    logits = forward(stored_weights(weights, dtype), config, PROMPT)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(actual, expected, atol=TOLERANCES[dtype])
    np.testing.assert_array_equal(out.logprobs, actual[:, 1].astype(np.float32))
    ranks = (actual > actual[:, 1:2]).sum(axis=1) + 1
    np.testing.assert_array_equal(out.ranks, ranks)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_both_file_formats_give_the_same(tmp_path: Path, device: str, model_type: str) -> None:
    config = make_config(model_type=model_type, head_dim=16, attention_bias=True)
    weights = make_weights(config, seed=2)
    files = (
        write_hf_folder(tmp_path, config, weights),
        write_gguf_file(tmp_path / "tiny.gguf", config, weights),
    )
    results = []
    for file in files:
        runner = make_runner(file, device=device)
        results.append(all_logprobs(runner)[0])
        runner.close()
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)


@pytest.mark.parametrize("projection", ["q", "k", "v", "o"])
def test_weights_that_are_no_numbers_give_no_token(
    tmp_path: Path, kernels: str, projection: str
) -> None:
    weights = make_weights(CONFIG, seed=2)
    weights[f"model.layers.0.self_attn.{projection}_proj.weight"][0, 0] = np.nan
    runner = make_runner(write_hf_folder(tmp_path, CONFIG, weights), device=kernels)
    assert run(runner, prefill()).token_ids.tolist() == [-1]
    runner.close()


def test_results_are_read_only_arrays_of_the_documented_shapes(runner: _core.ModelRunner) -> None:
    step = make_step([Chunk([1], 0, [1]), Chunk(PROMPT, 0, [4])])
    step["num_logprobs"] = np.array([2, 3], np.int32)
    out = run(runner, step)
    arrays = [out.token_ids, out.logprobs, out.ranks, out.top_ids, out.top_logprobs]
    assert [a.shape for a in arrays] == [(2,), (2,), (2,), (2, 3), (2, 3)]
    assert [a.dtype.name for a in arrays] == ["int32", "float32", "int32", "int32", "float32"]
    assert not any(a.flags.writeable for a in arrays)
    assert out.top_ids[0, 2] == -1
    assert out.top_logprobs[0, 2] == -np.inf
    assert out.timing_us >= 0


def test_results_outlive_the_runner(make: MakeRunner) -> None:
    runner = make()
    out = run(runner, prefill())
    expected = out.token_ids.tolist()
    runner.close()
    del runner
    assert out.token_ids.tolist() == expected


def test_a_step_may_want_no_rows(runner: _core.ModelRunner) -> None:
    step = make_step([Chunk(PROMPT[:6], 0, [4, 2], targets=[])])
    out = run(runner, step)
    assert out.token_ids.shape == (0,)
    assert out.top_ids.shape == (0, 0)
    rest = run(runner, make_step([Chunk(PROMPT[6:], 6, [4, 2])]))
    assert rest.token_ids.tolist() == run(runner, prefill()).token_ids.tolist()


def test_tokens_without_a_slot_are_not_written(runner: _core.ModelRunner) -> None:
    first = int(run(runner, prefill()).token_ids[0])
    expected = run(runner, decode(first, num_logprobs=5))
    step = decode(first + 1 if first < 159 else 0)
    step["slot_mapping"][:] = -1
    run(runner, step)
    # The key at that position is still the one of `first`: a later query sees no difference.
    following = decode(int(expected.token_ids[0]), len(PROMPT) + 1, num_logprobs=5)
    after = run(runner, following)
    run(runner, decode(first))
    np.testing.assert_array_equal(run(runner, following).top_logprobs, after.top_logprobs)


# Tickets


def test_two_steps_may_be_outstanding_and_are_collected_in_order(
    runner: _core.ModelRunner,
) -> None:
    first = runner.launch(**prefill())
    second = runner.launch(**make_step([Chunk([3], 0, [9])]))
    with pytest.raises(ValueError, match="2 steps are outstanding, collect the oldest first"):
        runner.launch(**prefill())
    with pytest.raises(ValueError, match=f"ticket {second} is not the oldest"):
        runner.collect(second)
    runner.collect(first)
    with pytest.raises(ValueError, match=f"{first} is not outstanding"):
        runner.collect(first)
    runner.collect(second)
    with pytest.raises(ValueError, match="is not outstanding"):
        runner.collect(second + 1)


def test_the_arrays_of_a_step_may_be_reused_at_once(runner: _core.ModelRunner) -> None:
    expected = run(runner, prefill()).token_ids.tolist()
    step = prefill()
    ticket = runner.launch(**step)
    for array in step.values():
        array.fill(0)
    assert runner.collect(ticket).token_ids.tolist() == expected


def test_negative_ids_are_samples_of_the_step_in_flight(runner: _core.ModelRunner) -> None:
    expected = greedy(runner, 4)
    # Row 1 of each step is the one that goes on; row 0 is another sequence's.
    other = [Chunk([9], 0, [30])]
    pending = runner.launch(**make_step([*other, Chunk(PROMPT, 0, [4, 2])]))
    tokens = []
    for i in range(3):
        step = make_step([*other, Chunk([~1], len(PROMPT) + i, [4, 2])])
        following = runner.launch(**step)
        tokens.append(int(runner.collect(pending).token_ids[1]))
        pending = following
    tokens.append(int(runner.collect(pending).token_ids[1]))
    assert tokens == expected


def test_negative_ids_need_such_a_row_in_the_step_before(runner: _core.ModelRunner) -> None:
    with pytest.raises(ValueError, match=r"token_ids\[0\]: got -1"):
        runner.launch(**decode(~0))
    run(runner, prefill())
    with pytest.raises(ValueError, match=r"token_ids\[0\]: got -2"):
        runner.launch(**decode(~1))
    run(runner, decode(~0))


# Masks and states


def test_a_step_waits_for_its_masks_and_the_next_for_it(runner: _core.ModelRunner) -> None:
    ticket = launch_masked(runner)
    following = runner.launch(**decode(~0, num_logprobs=1))
    allowed = np.zeros((1, 5), np.uint32)
    allowed[0, 3] = 1 << 4
    runner.set_masks(ticket, allowed)
    assert runner.collect(ticket).token_ids.tolist() == [100]
    chained = runner.collect(following)
    np.testing.assert_array_equal(run(runner, decode(100, num_logprobs=1)).top_ids, chained.top_ids)


def test_a_step_that_waits_for_its_masks_holds_up_no_other_runner(
    runner: _core.ModelRunner, make: MakeRunner
) -> None:
    other = make()
    ticket = launch_masked(runner)
    expected = run(other, prefill()).token_ids.tolist()
    other.close()
    make(threads=2).close()
    runner.set_masks(ticket, np.full((1, 5), 0xFFFFFFFF, np.uint32))
    assert runner.collect(ticket).token_ids.tolist() == expected


def test_a_mask_that_allows_nothing_fails_its_row_alone(runner: _core.ModelRunner) -> None:
    step = make_step([Chunk([3], 0, [9]), Chunk(PROMPT, 0, [4, 2])])
    expected = run(runner, step).token_ids[0]
    step["needs_mask"] = np.array([0, 1], np.uint8)
    ticket = runner.launch(**step)
    runner.set_masks(ticket, np.zeros((1, 5), np.uint32))
    out = runner.collect(ticket)
    assert out.token_ids.tolist() == [expected, -1]
    assert np.isnan(out.logprobs[1])
    # Its successor, launched before anybody knew, runs.
    run(runner, decode(~1))


def test_states_change_between_the_steps_around_them(runner: _core.ModelRunner) -> None:
    favourite = int(run(runner, prefill()).token_ids[0])
    step = prefill()
    step["state_slot"] = np.array([3], np.int32)
    step["presence_penalty"] = np.full(1, 1000.0, np.float32)
    seen = np.array([favourite], np.int32)
    runner.set_state(3, seen, 0)
    first = runner.launch(**step)
    runner.set_state(3, seen[:0], 0)
    second = runner.launch(**step)
    other = int(runner.collect(first).token_ids[0])
    assert other != favourite
    assert runner.collect(second).token_ids.tolist() == [favourite]
    # The second step's draw is in the state now.
    assert run(runner, step).token_ids.tolist() == [other]
    # Tokens of the prompt are not penalised for their presence.
    runner.set_state(3, seen, 1)
    assert run(runner, step).token_ids.tolist() == [favourite]


# Closing


def test_closing_is_final_and_idempotent(make: MakeRunner) -> None:
    runner = make()
    ticket = runner.launch(**prefill())
    assert runner.alive
    runner.close()
    runner.close()
    assert not runner.alive
    for call in (
        lambda: runner.launch(**prefill()),
        lambda: runner.collect(ticket),
        lambda: runner.set_state(0, np.zeros(1, np.int32), 0),
        lambda: runner.set_masks(ticket, np.zeros((1, 5), np.uint32)),
    ):
        with pytest.raises(_core.DeviceError, match="closed"):
            call()
    assert runner.vocab_size == 160


def test_closing_ends_a_step_that_waits_for_masks(make: MakeRunner) -> None:
    runner = make()
    launch_masked(runner)
    runner.close()
    assert not runner.alive


def test_a_runner_that_nobody_holds_closes_itself(make: MakeRunner) -> None:
    runner = make()
    launch_masked(runner)
    runner.launch(**prefill())
    del runner
    make().close()


# Loading


def test_the_same_weights_have_the_same_checksum(folder: Path, tmp_path: Path, device: str) -> None:
    other = write_hf_folder(tmp_path, CONFIG, make_weights(CONFIG, seed=3))
    checksums = []
    for path, threads in ((folder, 1), (folder, 2), (other, 1)):
        runner = make_runner(path, threads=threads, device=device)
        checksums.append(runner.weights_checksum)
        runner.close()
    assert checksums[0] == checksums[1] != checksums[2]


@pytest.mark.parametrize(
    ("stored", "dtype", "kv_dtype", "element"),
    [
        ("f32", "auto", "float32", 4),
        ("f32", "bfloat16", "bfloat16", 2),
        ("f32", "float32", "float32", 4),
        ("f16", "auto", "bfloat16", 2),
        ("bf16", "auto", "bfloat16", 2),
        ("bf16", "float32", "float32", 4),
    ],
)
def test_dtypes(tmp_path: Path, stored: str, dtype: str, kv_dtype: str, element: int) -> None:
    path = write_hf_folder(tmp_path, CONFIG, WEIGHTS, dtype=stored)
    runner = make_runner(path, dtype=dtype)
    vectors = sum(w.size for w in WEIGHTS.values() if w.ndim == 1) * 4
    matrices = sum(w.size for w in WEIGHTS.values() if w.ndim > 1) * element
    assert runner.kv_dtype == kv_dtype
    assert runner.weight_bytes == vectors + matrices
    runner.close()


def test_random_weights_need_no_file(tmp_path: Path, device: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    first, second = (make_runner(tmp_path, "dummy", threads=n, device=device) for n in (1, 2))
    assert first.weights_checksum == second.weights_checksum
    assert greedy(first, 3) == greedy(second, 3)
    first.close()
    second.close()


def test_progress_counts_all_bytes(folder: Path, make: MakeRunner) -> None:
    seen: list[tuple[int, int]] = []
    make(progress=lambda done, total: seen.append((done, total))).close()
    done = [d for d, _ in seen]
    assert done == sorted(set(done))
    assert {total for _, total in seen} == {load_checkpoint(folder).weight_bytes} == {done[-1]}


def test_an_exception_in_progress_stops_the_load(make: MakeRunner) -> None:
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(progress=stop)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_blocks", 0, "num_blocks: got 0"),
        ("max_num_tokens", 0, "max_num_tokens: got 0"),
        ("max_num_seqs", 0, "max_num_seqs: got 0"),
        ("threads", 0, "threads: got 0"),
        ("threads", 1025, "threads: got 1025"),
        ("dtype", "int8", "dtype: got 'int8', expected auto, bfloat16, float16 or float32"),
    ],
)
def test_wrong_options_are_refused(folder: Path, option: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_runner(folder, **{option: value})


@pytest.mark.parametrize("block_size", [0, 8, 17, 8192])
def test_wrong_block_sizes_are_refused(folder: Path, block_size: int) -> None:
    config = native_config(load_checkpoint(folder).config)
    with pytest.raises(ValueError, match=f"block_size: got {block_size}"):
        _core.ModelRunner(
            config, [], num_blocks=[1], block_size=block_size, max_num_tokens=1, max_num_seqs=1,
            threads=1,
        )  # fmt: skip


def test_an_unknown_device_is_refused(folder: Path) -> None:
    with pytest.raises(_core.DeviceError, match="tpu"):
        make_runner(folder, device="tpu")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    config = native_config(load_checkpoint(folder).config)
    with pytest.raises(_core.WeightError, match=r"embed\.weight"):
        _core.ModelRunner(
            config, [], num_blocks=[1], block_size=16, max_num_tokens=1, max_num_seqs=1, threads=1
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": []}, r"shape is \[\], expected \[160, 64\]"),
        ({"shape": [160, 64, 1]}, r"shape is \[160, 64, 1\]"),
        ({"shape": [-160, -64]}, r"shape is \[-160, -64\]"),
        ({"shape": [2**62, 2**62]}, "shape is"),
        ({"nbytes": 2**63 - 1}, "takes 9223372036854775807 bytes"),
        ({"offset": 2**63 - 1}, r"bytes 9223372036854775807 \+ 40960 lie outside the file"),
        ({"offset": 2**63 - 40960}, r"\+ 40960 lie outside the file"),
        ({"file": "missing"}, "cannot open"),
        ({"file": "."}, "not a regular file"),
        ({"name": "final_norm.weight"}, "named twice"),
    ],
    ids=str,
)
def test_hostile_entries_are_refused(folder: Path, change: dict[str, object], message: str) -> None:
    checkpoint = load_checkpoint(folder)
    fields = ("name", "dtype", "shape", "file", "offset", "nbytes")
    columns = [{field: getattr(entry, field) for field in fields} for entry in checkpoint.entries]
    embed = next(c for c in columns if c["name"] == "embed.weight")
    embed.update(change)
    with pytest.raises(_core.WeightError, match=message):
        _core.ModelRunner(
            native_config(checkpoint.config), [_core.TensorEntry(**c) for c in columns],
            num_blocks=[1], block_size=16, max_num_tokens=1, max_num_seqs=1, threads=2,
        )  # fmt: skip


def test_a_named_pipe_is_no_weight_file(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    config = native_config(load_checkpoint(folder).config)
    entry = _core.TensorEntry("embed.weight", "f32", [160, 64], str(tmp_path / "pipe"), 0, 40960)
    with pytest.raises(_core.WeightError, match="not a regular file"):
        _core.ModelRunner(
            config, [entry], num_blocks=[1], block_size=16, max_num_tokens=1, max_num_seqs=1,
            threads=1,
        )  # fmt: skip


def tiny_config(**sizes: object) -> _core.ModelConfig:
    ones: dict[str, object] = {
        "vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_heads": 1,
        "num_kv_heads": 1, "head_dim": 2, "max_position": 16, "rms_norm_eps": 1e-5,
        "query_scale": 1.0, "attn_softcap": 0.0, "embed_scale": 1.0,
        "residual_scale": 1.0, "logit_scale": 1.0, "final_softcap": 0.0, "activation": "silu",
        "tie_embeddings": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False,
        "pre_norm": True, "post_norm": False, "norm_zero_centered": False, "qk_norm": "none",
        "interleaved_qk": False,
        "ropes": [_core.Rope([])], "layers": [_core.LayerConfig()],
    }  # fmt: skip
    return _core.ModelConfig(**(ones | sizes))  # type: ignore[arg-type]


def random_entry(name: str, *shape: int) -> _core.TensorEntry:
    return _core.TensorEntry(name, "f32", shape, "", 0, 4 * math.prod(shape))


def random_layer(layer: int, attention: int) -> list[_core.TensorEntry]:
    """Entries of a layer with hidden size 1 and ``attention`` outputs of each of q, k and v."""
    shapes = {
        "attn_norm": (1,), "q": (attention, 1), "k": (attention, 1), "v": (attention, 1),
        "o": (1, attention), "mlp_norm": (1,), "gate": (1, 1), "up": (1, 1), "down": (1, 1),
    }  # fmt: skip
    return [random_entry(f"layers.{layer}.{name}.weight", *s) for name, s in shapes.items()]


def test_a_cache_larger_than_any_memory_is_refused() -> None:
    layers, heads, head_dim = 32, 32, 1024
    config = tiny_config(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        layers=[_core.LayerConfig()] * layers,
    )
    entries = [random_entry("embed.weight", 1, 1), random_entry("final_norm.weight", 1)]
    for layer in range(layers):
        entries += random_layer(layer, heads * head_dim)
    with pytest.raises(_core.DeviceError, match="blocks of 1073741824 bytes for the KV cache"):
        _core.ModelRunner(
            config, entries, num_blocks=[2**30 - 1], block_size=4096, max_num_tokens=1,
            max_num_seqs=1, threads=1,
        )  # fmt: skip


@pytest.mark.parametrize("block_size", [-16, 0, 8, 17, 8192])
def test_block_sizes_that_no_cache_has_take_no_bytes(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size: got {block_size}"):
        _core.kv_block_bytes(tiny_config(), device="cpu", dtype="float32", block_size=block_size)


def test_quantised_biases_cannot_be_reordered() -> None:
    config = tiny_config(num_heads=16, num_kv_heads=16, qkv_bias=True, interleaved_qk=True)
    entries = [
        random_entry("embed.weight", 1, 1),
        *random_layer(0, 32),
        _core.TensorEntry("layers.0.q.bias", "q8_0", [32], "", 0, 34),
    ]
    with pytest.raises(_core.WeightError, match="cannot be put in order"):
        _core.ModelRunner(
            config, entries, num_blocks=[1], block_size=16, max_num_tokens=1, max_num_seqs=1,
            threads=1,
        )  # fmt: skip


def test_runners_can_be_made_again_and_side_by_side(make: MakeRunner) -> None:
    first, second = make(threads=2), make(threads=1)
    tickets = first.launch(**prefill()), second.launch(**prefill())
    tokens = first.collect(tickets[0]).token_ids, second.collect(tickets[1]).token_ids
    assert tokens[0].tolist() == tokens[1].tolist()
    first.close()
    second.close()
    third = make()
    assert run(third, prefill()).token_ids.tolist() == tokens[0].tolist()
    third.close()
