from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rapshee_engine import _core
from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.engine import Engine
from rapshee_engine.engine.kv_cache import KVGroup
from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.engine.runner import Runner
from rapshee_engine.errors import ConfigError, EngineDeadError, StepError, WeightFileError
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.weights.loader import load_checkpoint
from reference.devices import is_emulated, native_dtype
from reference.fake_runner import EOS, make_library_tokenizer, make_tokenizer
from reference.tiny_llama import make_config, make_weights, write_hf_folder

BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # layers, K and V, heads, head size, f32, tokens
PROMPT = [(7 * i) % 200 for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


WINDOWS = {
    "model_type": "qwen3",
    "head_dim": 16,
    "use_sliding_window": True,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"],
}


def write_checkpoint(folder: Path, dtype: str = "f32", **changes: Any) -> Path:
    tokenizer = make_tokenizer()
    config = make_config(vocab_size=tokenizer.vocab_size, eos_token_id=EOS, **changes)
    write_hf_folder(folder, config, make_weights(config, seed=3), dtype)
    make_library_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def make_runner(folder: Path, device: str = "cpu", **options: Any) -> Runner:
    config = EngineConfig(model=str(folder), device=device, max_num_seqs=8, **options)
    return Runner(config, load_checkpoint(folder))


def make_engine(folder: Path, **options: Any) -> Engine:
    options = {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 20, "threads": 1, **options}
    return Engine.from_config(EngineConfig(model=str(folder), **options))


@pytest.fixture
def runner(folder: Path, device: str) -> Iterator[Runner]:
    runner = make_runner(folder, device, threads=1)
    yield runner
    runner.close()


def test_the_pool_is_sized_by_its_memory(folder: Path) -> None:
    runner = make_runner(folder, kv_cache_memory_bytes=10 * BLOCK_BYTES + 5)
    assert (runner.kv_groups, runner.block_size) == ((KVGroup(10),), 16)
    runner.close()


def test_the_pool_holds_all_contexts_by_default(runner: Runner, device: str) -> None:
    assert runner.block_size == _core.default_block_size(device)
    assert runner.kv_groups == (KVGroup(8 * 256 // runner.block_size),)


def test_the_default_pool_follows_max_model_len_and_block_size(folder: Path) -> None:
    runner = make_runner(folder, max_model_len=100, block_size=32)
    assert (runner.kv_groups, runner.block_size) == ((KVGroup(8 * 4),), 32)
    runner.close()


def test_layers_with_a_window_get_fewer_blocks(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, **WINDOWS, max_position_embeddings=4096)
    options: dict[str, Any] = {"enable_prefix_caching": False, "max_num_batched_tokens": 32}
    runner = make_runner(folder, **options)
    contexts = KVGroup(8 * 4096 // 16)
    assert runner.kv_groups == (KVGroup(8 * (2 + 3) + 4, 20), contexts)
    runner.close()
    # A block of each group takes as much here.
    runner = make_runner(folder, kv_cache_memory_bytes=30 * BLOCK_BYTES, **options)
    assert runner.kv_groups == (KVGroup(30, 20), KVGroup(30))
    runner.close()
    runner = make_runner(folder, kv_cache_memory_bytes=100 * BLOCK_BYTES, **options)
    assert runner.kv_groups == (KVGroup(44, 20), KVGroup(156))
    runner.close()


def test_a_long_generation_keeps_a_window(tmp_path: Path) -> None:
    engine = make_engine(write_checkpoint(tmp_path, **WINDOWS), max_num_batched_tokens=32)
    params = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    engine.add_request("only", {"prompt_token_ids": PROMPT}, params)
    windowed, full = engine.scheduler.kv_cache.pools
    used = []
    while engine.has_unfinished:
        engine.step()
        engine.scheduler.check_integrity()
        used.append(windowed.num_blocks - windowed.num_free)
    # 19 tokens before the next one lie in three blocks at most, and a step of 32 in two more.
    assert max(used[2:-1]) == 3
    assert max(used) <= 5
    assert full.num_free == full.num_blocks
    assert engine.stats.generation_tokens == 150
    engine.close()


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
    message = r"^cannot load '.*': no device 'cuda:77'.*; available: cpu"
    with pytest.raises(ConfigError, match=message):
        make_runner(folder, "cuda:77")


def pretend(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Replace what the native extension says of this machine."""
    for name, function in functions.items():
        monkeypatch.setattr(_core, name, function)


def test_auto_is_the_first_gpu_or_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def device_dtypes(device: str) -> list[str]:
        asked.append(device)
        raise _core.DeviceError("far enough")

    for devices in (
        ["cpu"],
        ["cpu", "cuda:0", "cuda:1"],
        ["cpu", "cuda-emu:0"],  # for tests: nobody gets it unasked
    ):
        pretend(monkeypatch, list_devices=devices.copy, device_dtypes=device_dtypes)
        with pytest.raises(ConfigError, match="far enough"):
            make_runner(folder, "auto")
    assert asked == ["cpu", "cuda:0", "cpu"]


def test_a_dtype_that_the_device_has_not_is_refused(folder: Path, device: str) -> None:
    here = ["auto", *_core.device_dtypes(device)]
    for dtype in {"float16", "float32"} - set(here):
        with pytest.raises(
            ConfigError, match=f"{device} has no dtype '{dtype}'; available: auto, bf"
        ):
            make_runner(folder, device, dtype=dtype)
    assert "bfloat16" in here


def test_the_dtype_of_the_cache_follows(folder: Path, device: str) -> None:
    for dtype in ("auto", *_core.device_dtypes(device)):
        runner = make_runner(folder, device, dtype=dtype)
        expected = {"f32": "float32", "bf16": "bfloat16"}[native_dtype(device)]
        assert runner._runner.kv_dtype == (expected if dtype == "auto" else dtype)
        runner.close()


def test_a_gpu_gives_its_memory_to_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_bytes = load_checkpoint(folder).weight_bytes
    blocks: list[list[int]] = []

    def take(*_: Any, **options: Any) -> None:
        blocks.append(options["num_blocks"])
        raise _core.DeviceError("out of memory")

    pretend(
        monkeypatch,
        list_devices=lambda: ["cpu", "cuda:0"],
        device_dtypes=lambda _: ["bfloat16", "float16"],
        default_block_size=lambda _: 16,
        kv_block_bytes=lambda *_, dtype, **__: {"bfloat16": [1000]}[dtype],
        workspace_bytes=lambda *_, max_num_tokens, **__: max_num_tokens,
        available_memory=lambda _: weight_bytes + 512 + 100_000,
        ModelRunner=take,
    )
    for options in ({}, {"max_model_len": 32}, {"kv_cache_memory_bytes": 100_000}):
        with pytest.raises(ConfigError, match=r"cannot load '.*': out of memory"):
            make_runner(folder, "auto", **options)
    # 90 % of what weights and workspace leave, if that many contexts need it; or what is asked for.
    assert blocks == [[90], [8 * 2], [100]]
    with pytest.raises(ConfigError, match=r"100001\) is more than the 100000 bytes .* cuda:0"):
        make_runner(folder, "auto", kv_cache_memory_bytes=100_001)


def test_an_int8_cache_holds_more_tokens(folder: Path) -> None:
    sizes = {}
    for kv_dtype in ("auto", "bf16", "int8"):
        runner = make_runner(folder, kv_cache_memory_bytes=10 * BLOCK_BYTES, kv_dtype=kv_dtype)
        sizes[kv_dtype] = runner.kv_groups[0].num_blocks
        assert {"auto": "float32", "bf16": "bfloat16", "int8": "int8"}[kv_dtype] in runner.identity
        runner.close()
    # Heads of 16: 16 codes and a float for each token, where bf16 takes 32 bytes, f32 64.
    assert sizes == {"auto": 10, "bf16": 20, "int8": 32}


def test_the_cpu_has_no_faster_way_than_the_deterministic_one(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"deterministic=False .* needs a CUDA device"):
        make_runner(folder, "cpu", deterministic=False)


def test_the_identity_tells_weights_apart(
    folder: Path, runner: Runner, device: str, tmp_path: Path
) -> None:
    config = make_config(vocab_size=runner.vocab_size, eos_token_id=EOS)
    other = make_runner(write_hf_folder(tmp_path, config, make_weights(config, seed=4)), device)
    same = make_runner(folder, device)
    assert runner.identity == same.identity != other.identity
    assert runner.description in runner.identity
    other.close()
    same.close()


def test_the_identity_tells_rotations_apart(device: str, tmp_path: Path) -> None:
    config = make_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    folder = write_hf_folder(tmp_path, config, make_weights(config, seed=4))
    identities = set()
    for length in (None, 256, 300, 400):  # the first two are within the trained length
        checkpoint = load_checkpoint(folder, context_length=length)
        runner = Runner(EngineConfig(model=str(folder), device=device), checkpoint)
        identities.add(runner.identity)
        runner.close()
    assert len(identities) == 3


def test_quantised_weights_are_others_that_answer_alike(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setenv("RAPSHEE_CACHE", str(tmp_path))
    fingerprints, scores = [], []
    for mode in (None, "q8", "q4", "q4"):
        engine = make_engine(folder, device=device, quantize=mode)
        fingerprints.append(engine.fingerprint)
        scores.append(generate_all(engine, params(max_tokens=1, temperature=0.0)).outputs[0])
        engine.close()
    assert len(set(fingerprints)) == 3
    assert fingerprints[2] == fingerprints[3]
    assert len(list((tmp_path / "quantized").iterdir())) == 2
    assert scores[0].token_ids == scores[1].token_ids
    assert scores[0].logprobs != scores[1].logprobs
    assert scores[2] == scores[3]


def test_the_identity_does_not_depend_on_threads(folder: Path, runner: Runner, device: str) -> None:
    other = make_runner(folder, device, threads=2)
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


def test_a_path_that_is_no_text_is_named_all_the_same(folder: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/model-\xff"))
    shutil.copytree(folder, odd)
    checkpoint = load_checkpoint(odd)
    os.truncate(odd / "model.safetensors", 100)
    with pytest.raises(WeightFileError) as caught:
        Runner(EngineConfig(model=str(odd), device="cpu"), checkpoint)
    assert caught.value.file == str(odd / "model.safetensors")


def test_a_claimed_context_takes_no_memory(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 1 << 30
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = make_engine(tmp_path)
    assert engine.max_model_len == 1 << 30
    assert engine._builder._tables.nbytes < 1 << 20
    engine.close()


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


@dataclass(frozen=True)
class Rig:
    """What a scene plays on: engines of one device, with a checkpoint in its dtype."""

    folder: Path
    device: str

    def engine(self, *, num_blocks: int | None = None, **options: Any) -> Engine:
        if num_blocks is not None:
            block_bytes = BLOCK_BYTES if native_dtype(self.device) == "f32" else BLOCK_BYTES // 2
            options["kv_cache_memory_bytes"] = num_blocks * block_bytes
        return make_engine(self.folder, device=self.device, block_size=16, **options)

    @property
    def num_others(self) -> int:
        return 4 if is_emulated(self.device) else 31

    def shortened(self, options: SamplingParams) -> SamplingParams:
        return replace(options, max_tokens=12) if is_emulated(self.device) else options


def generate(rig: Rig, engine: Engine, options: SamplingParams) -> RequestOutput:
    return generate_all(engine, rig.shortened(options))


def generate_all(engine: Engine, options: SamplingParams) -> RequestOutput:
    engine.add_request("only", {"prompt_token_ids": PROMPT}, options)
    outputs = {}
    while engine.has_unfinished:
        for event in engine.step():
            assert isinstance(event, RequestOutput)
            outputs[event.request_id] = event
        engine.scheduler.check_integrity()
    return outputs["only"]


def among_others(rig: Rig, engine: Engine, options: SamplingParams) -> RequestOutput:
    for i in range(rig.num_others):
        prompt = PROMPT[: i % 37 + 1] + [i] * (i % 5)
        others = rig.shortened(params(seed=i))
        engine.add_request(f"other-{i}", {"prompt_token_ids": prompt}, others)
    return generate(rig, engine, options)


def after_the_same_prompt(rig: Rig, engine: Engine, options: SamplingParams) -> RequestOutput:
    generate(rig, engine, params())
    return generate(rig, engine, options)


def preempted(rig: Rig, engine: Engine, options: SamplingParams) -> RequestOutput:
    """Seven blocks are just enough for two prompts and one block more."""
    before = rig.shortened(params(max_tokens=60))
    engine.add_request("before", {"prompt_token_ids": [9] * 46}, before)
    output = generate(rig, engine, options)
    assert engine.stats.num_preemptions > 0
    return output


@pytest.fixture(scope="module", params=["full", "windows"])
def rig(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: str
) -> Rig:
    """A model that sees everything, and one of whose layers one has a window."""
    changes = WINDOWS if request.param == "windows" else {}
    folder = tmp_path_factory.mktemp(request.param)
    return Rig(write_checkpoint(folder, native_dtype(device), **changes), device)


@pytest.fixture(scope="module")
def expected(rig: Rig) -> dict[str, RequestOutput]:
    engine = rig.engine()
    outputs = {name: generate(rig, engine, options) for name, options in CASES.items()}
    engine.close()
    return outputs


Scene = Callable[[Rig, Engine, SamplingParams], RequestOutput]
SCENES: dict[str, tuple[Scene, dict[str, Any]]] = {
    "chunks of 9": (generate, {"max_num_batched_tokens": 9}),
    "two threads": (generate, {"threads": 2}),
    "a step in flight": (generate, {"async_scheduling": True}),
    "among others": (among_others, {}),
    "among others, a step in flight": (among_others, {"async_scheduling": True, "threads": 2}),
    "among others, in chunks of 9": (among_others, {"max_num_batched_tokens": 9}),
    "after the same prompt": (after_the_same_prompt, {}),
    "preempted": (preempted, {"num_blocks": 7}),
    "preempted, a step in flight": (preempted, {"num_blocks": 7, "async_scheduling": True}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scene", SCENES)
def test_a_request_yields_the_same_bits(
    rig: Rig, expected: dict[str, RequestOutput], scene: str, name: str
) -> None:
    run, options = SCENES[scene]
    engine = rig.engine(**options)
    actual = run(rig, engine, CASES[name])
    engine.close()
    assert actual.outputs == expected[name].outputs
    assert actual.prompt_logprobs == expected[name].prompt_logprobs


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_preempted_prompt_is_scored_the_same(
    rig: Rig, expected: dict[str, RequestOutput], async_scheduling: bool
) -> None:
    """A token of the prompt a step, beside a sequence that soon needs its blocks."""
    engine = rig.engine(
        num_blocks=7, max_num_batched_tokens=2, max_num_seqs=2, async_scheduling=async_scheduling
    )
    engine.add_request("before", {"prompt_token_ids": [9] * 46}, params(max_tokens=40))
    output = generate_all(engine, params(prompt_logprobs=2, max_tokens=0))
    assert engine.stats.num_preemptions > 0
    engine.close()
    assert output.prompt_logprobs == expected["scored"].prompt_logprobs
    assert [(o.token_ids, o.finish_reason) for o in output.outputs] == [([], "length")]
