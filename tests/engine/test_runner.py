from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rapshee_engine import _core
from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.engine import Engine
from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.engine.runner import Runner
from rapshee_engine.errors import ConfigError, EngineDeadError, StepError, WeightFileError
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.weights.loader import load_checkpoint
from reference.fake_runner import EOS, make_tokenizer
from reference.tiny_llama import make_config, make_weights, write_hf_folder

BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # layers, K and V, heads, head size, f32, tokens
PROMPT = [(7 * i) % 200 for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    config = make_config(vocab_size=tokenizer.vocab_size, eos_token_id=EOS)
    write_hf_folder(folder, config, make_weights(config, seed=3))
    tokenizer._hf.save(str(folder / "tokenizer.json"))
    return folder


def make_runner(folder: Path, **options: Any) -> Runner:
    config = EngineConfig(model=str(folder), max_num_seqs=8, **options)
    return Runner(config, load_checkpoint(folder))


def make_engine(folder: Path, **options: Any) -> Engine:
    options = {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 20, "threads": 1, **options}
    return Engine.from_config(EngineConfig(model=str(folder), **options))


@pytest.fixture
def runner(folder: Path) -> Iterator[Runner]:
    runner = make_runner(folder, threads=1)
    yield runner
    runner.close()


def test_the_pool_is_sized_by_its_memory(folder: Path) -> None:
    runner = make_runner(folder, kv_cache_memory_bytes=10 * BLOCK_BYTES + 5)
    assert (runner.num_blocks, runner.block_size) == (10, 16)
    runner.close()


def test_the_pool_holds_all_contexts_by_default(runner: Runner) -> None:
    assert runner.num_blocks == 8 * 256 // 16


def test_the_default_pool_follows_max_model_len_and_block_size(folder: Path) -> None:
    runner = make_runner(folder, max_model_len=100, block_size=32)
    assert (runner.num_blocks, runner.block_size) == (8 * 4, 32)
    runner.close()


def test_a_cache_below_one_block_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="set kv_cache_memory_bytes"):
        make_runner(folder, kv_cache_memory_bytes=100)
    with pytest.raises(ConfigError, match=r"kv_cache_memory_bytes .* more than the"):
        make_runner(folder, kv_cache_memory_bytes=1 << 62)


@pytest.mark.parametrize("block_size", [1, 7, 24])
def test_a_block_size_that_the_device_cannot_have_is_refused(folder: Path, block_size: int) -> None:
    with pytest.raises(ConfigError, match="block_size"):
        make_runner(folder, block_size=block_size)


def test_an_unknown_device_is_refused_with_those_that_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match="available: cpu"):
        make_runner(folder, device="tpu")


def test_the_identity_tells_weights_apart(folder: Path, runner: Runner, tmp_path: Path) -> None:
    config = make_config(vocab_size=runner.vocab_size, eos_token_id=EOS)
    other = make_runner(write_hf_folder(tmp_path, config, make_weights(config, seed=4)))
    same = make_runner(folder)
    assert runner.identity == same.identity != other.identity
    assert runner.description in runner.identity
    other.close()
    same.close()


def test_the_identity_does_not_depend_on_threads(folder: Path, runner: Runner) -> None:
    other = make_runner(folder, threads=2)
    assert other.identity == runner.identity
    other.close()


def test_weights_that_end_early_are_a_weight_file_error(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    checkpoint = load_checkpoint(tmp_path)
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    with pytest.raises(WeightFileError) as caught:
        Runner(EngineConfig(model=str(tmp_path)), checkpoint)
    assert caught.value.file == str(weights)
    assert caught.value.tensor is not None


def test_a_refused_call_is_a_step_error_and_the_runner_goes_on(runner: Runner) -> None:
    for _ in range(2):
        with pytest.raises(StepError, match="slot"):
            runner.set_state(99, np.zeros(1, np.int32), 1)


def test_a_device_that_failed_for_good_is_a_dead_engine(runner: Runner) -> None:
    runner.close()
    with pytest.raises(EngineDeadError):
        runner.collect(1)


def test_the_number_of_cores_is_the_default_for_threads(folder: Path) -> None:
    assert _core.usable_cores() >= 1
    make_runner(folder).close()


# The same equality as over the fake runner, over the native one.


def params(**options: Any) -> SamplingParams:
    options = {"max_tokens": 24, "seed": 1, "logprobs": 3, **options}
    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, ignore_eos=True, **options)


CASES = {
    "greedy": params(temperature=0.0),
    "sampled": params(top_p=0.9, top_k=40, min_p=0.01),
    "penalties": params(presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2),
    "constrained": params(allowed_token_ids=list(range(60)), logit_bias={5: 2.0}, min_tokens=4),
    "scored": params(prompt_logprobs=2, n=2),
}


def generate(engine: Engine, options: SamplingParams) -> RequestOutput:
    engine.add_request("only", {"prompt_token_ids": PROMPT}, options)
    outputs = {}
    while engine.has_unfinished:
        for event in engine.step():
            assert isinstance(event, RequestOutput)
            outputs[event.request_id] = event
        engine.scheduler.check_integrity()
    return outputs["only"]


def among_others(engine: Engine, options: SamplingParams) -> RequestOutput:
    for i in range(31):
        prompt = PROMPT[: i % 37 + 1] + [i] * (i % 5)
        engine.add_request(f"other-{i}", {"prompt_token_ids": prompt}, params(seed=i))
    return generate(engine, options)


def after_the_same_prompt(engine: Engine, options: SamplingParams) -> RequestOutput:
    generate(engine, params())
    return generate(engine, options)


def preempted(engine: Engine, options: SamplingParams) -> RequestOutput:
    engine.add_request("before", {"prompt_token_ids": [9] * 30}, params(max_tokens=60))
    output = generate(engine, options)
    assert engine.stats.num_preemptions > 0
    return output


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, RequestOutput]:
    engine = make_engine(folder)
    outputs = {name: generate(engine, options) for name, options in CASES.items()}
    engine.close()
    return outputs


SCENES: dict[str, tuple[Callable[[Engine, SamplingParams], RequestOutput], dict[str, Any]]] = {
    "chunks of 9": (generate, {"max_num_batched_tokens": 9}),
    "two threads": (generate, {"threads": 2}),
    "a step in flight": (generate, {"async_scheduling": True}),
    "among others": (among_others, {}),
    "among others, a step in flight": (among_others, {"async_scheduling": True, "threads": 2}),
    "among others, in chunks of 9": (among_others, {"max_num_batched_tokens": 9}),
    "after the same prompt": (after_the_same_prompt, {}),
    "preempted": (preempted, {"kv_cache_memory_bytes": 7 * BLOCK_BYTES}),
    "preempted, a step in flight": (
        preempted,
        {"kv_cache_memory_bytes": 7 * BLOCK_BYTES, "async_scheduling": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scene", SCENES)
def test_a_request_yields_the_same_bits(
    folder: Path, expected: dict[str, RequestOutput], scene: str, name: str
) -> None:
    run, options = SCENES[scene]
    engine = make_engine(folder, **options)
    actual = run(engine, CASES[name])
    engine.close()
    assert actual.outputs == expected[name].outputs
    assert actual.prompt_logprobs == expected[name].prompt_logprobs
