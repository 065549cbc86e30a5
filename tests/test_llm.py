from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine import _core
from rapshee_engine.errors import (
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    StepError,
)
from rapshee_engine.llm import LLM
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from reference.fake_runner import FakeRunner, FakeStepOutput, make_engine
from reference.tiny_llama import make_config


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 6, "seed": 1, **options})


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM.from_engine(make_engine()) as llm:
        yield llm


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["a much longer prompt", {"prompt": "b"}, {"prompt_token_ids": [1, 2, 3]}]
    lengths = [9, 2, 5]
    outputs = llm.generate(prompts, [params(max_tokens=n) for n in lengths], use_tqdm=False)
    assert [o.prompt for o in outputs] == ["a much longer prompt", "b", None]
    assert outputs[2].prompt_token_ids == [1, 2, 3]
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths
    assert all(o.finished for o in outputs)


@pytest.mark.parametrize("prompt", ["one", {"prompt": "one"}])
def test_a_single_prompt_needs_no_list(llm: LLM, prompt: Any) -> None:
    (output,) = llm.generate(prompt, params(), use_tqdm=False)
    assert output.prompt == "one"


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], use_tqdm=False) == []


def test_sampling_params_have_defaults(llm: LLM) -> None:
    (output,) = llm.generate("one", use_tqdm=False)
    assert 1 <= len(output.outputs[0].token_ids) <= 16


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_the_output_is_whole_whatever_its_kind(llm: LLM, kind: RequestOutputKind) -> None:
    (output,) = llm.generate("one", params(n=2, output_kind=kind), use_tqdm=False)
    assert [len(o.token_ids) for o in output.outputs] == [6, 6]


def test_the_progress_bar_counts_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], params(), use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(["a", "b"], params())
    assert "2/2" in capsys.readouterr().err


def test_chat_answers_one_conversation_or_several(llm: LLM) -> None:
    first = [{"role": "user", "content": "hi"}]
    second = [{"role": "user", "content": "bye"}]
    (alone,) = llm.chat(first, params(), use_tqdm=False)
    together = llm.chat([first, second], params(), use_tqdm=False)
    assert together[0].outputs == alone.outputs
    assert together[1].prompt_token_ids != alone.prompt_token_ids
    text = llm.get_tokenizer().decode(alone.prompt_token_ids, skip_special_tokens=False)
    assert text == "<|start|>user: hi<|end|><|start|>assistant: "


@pytest.mark.parametrize("messages", [[], [[]]])
def test_chat_needs_messages(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="must not be empty"):
        llm.chat(messages, use_tqdm=False)


@pytest.mark.parametrize(
    "messages", ["hi", {"role": "user", "content": "hi"}, [5], ["hi"], [{"role": "user"}, "hi"]]
)
def test_what_is_no_list_of_messages_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"list of messages|a message must"):
        llm.chat(messages, use_tqdm=False)


def test_params_must_be_one_for_all_or_one_for_each(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="2 prompts, but 3 sampling_params"):
        llm.generate(["a", "b"], [params()] * 3, use_tqdm=False)


def test_one_bad_prompt_refuses_the_call_and_the_model_goes_on(llm: LLM) -> None:
    with pytest.raises(ValueError, match="empty"):
        llm.generate(["good", ""], params(), use_tqdm=False)
    assert not llm._engine.has_unfinished
    assert len(llm.generate("good", params(), use_tqdm=False)) == 1


def test_a_failed_step_ends_the_call_and_the_model_goes_on(llm: LLM) -> None:
    runner = llm._engine.runner
    assert isinstance(runner, FakeRunner)
    runner.collect_errors[2] = StepError("on demand")
    with pytest.raises(StepError, match="on demand"):
        llm.generate(["a"] * 20, params(), use_tqdm=False)
    assert not llm._engine.has_unfinished
    assert len(llm.generate("a", params(), use_tqdm=False)) == 1


def test_a_dead_engine_says_so(llm: LLM) -> None:
    runner = llm._engine.runner
    assert isinstance(runner, FakeRunner)
    runner.collect_errors[2] = EngineDeadError("gone")
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="gone"):
            llm.generate("a", params(), use_tqdm=False)


class InterruptingRunner(FakeRunner):
    """Presses Ctrl-C in a step, whatever the main thread is doing."""

    interrupt_at = 3

    def collect(self, ticket: int) -> FakeStepOutput:
        if ticket == self.interrupt_at:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return super().collect(ticket)


@pytest.fixture
def feels_ctrl_c() -> Iterator[None]:
    """Python's own handler, also where tests run with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("feels_ctrl_c")
def test_ctrl_c_ends_the_requests_and_leaves_the_model_usable() -> None:
    engine = make_engine(max_position=100_000, num_blocks=30_000)
    engine.runner = InterruptingRunner(num_blocks=30_000, block_size=4)
    with LLM.from_engine(engine) as llm:
        endless = params(max_tokens=90_000, ignore_eos=True)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], endless, use_tqdm=False)
        assert not engine.has_unfinished
        engine.scheduler.check_integrity()
        (output,) = llm.generate("a", params(), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 6


def test_close_gives_everything_back() -> None:
    engine = make_engine()
    before = threading.active_count()
    llm = LLM.from_engine(engine)
    llm.generate("a", params(), use_tqdm=False)
    llm.close()
    llm.close()
    assert engine.runner.is_closed  # type: ignore[attr-defined]
    assert threading.active_count() == before
    with pytest.raises(EngineClosedError):
        llm.generate("a", params(), use_tqdm=False)


def test_options_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM("model.gguf", max_num_seqs=0)
    with pytest.raises(TypeError, match="unknown_option"):
        LLM("model.gguf", unknown_option=1)
    with pytest.raises(ConfigError, match="does not exist"):
        LLM("no/such/model.gguf")


# Random weights instead of a checkpoint


@pytest.fixture
def dummy(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    return tmp_path


def test_a_configuration_is_enough_on_each_device(dummy: Path, device: str) -> None:
    prompts = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [4]}]
    tokens = []
    for dtype in ("auto", "bfloat16"):  # random weights are bfloat16
        with LLM(model=str(dummy), load_format="dummy", device=device, dtype=dtype) as llm:
            outputs = llm.generate(prompts, params(temperature=0.0, logprobs=2), use_tqdm=False)
            assert llm._engine.runner.block_size == _core.default_block_size(device)
        tokens.append([output.outputs[0].token_ids for output in outputs])
        assert [output.outputs[0].text for output in outputs] == ["", ""]
        assert {len(ids) for ids in tokens[-1]} == {6}
    assert tokens[0] == tokens[1]


def test_without_a_tokenizer_there_is_no_text(dummy: Path) -> None:
    with LLM(model=str(dummy), load_format="dummy", device="cpu") as llm:
        with pytest.raises(InvalidRequestError, match="loaded without a tokenizer"):
            llm.generate("text", use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="no chat template"):
            llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
    with pytest.raises(ConfigError, match="chat_template needs a tokenizer"):
        LLM(model=str(dummy), load_format="dummy", chat_template="{{ messages }}")


def test_random_weights_need_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        LLM(model=str(tmp_path), load_format="dummy")
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        LLM(model=str(tmp_path))


def test_a_dynamic_rotation_reaches_as_far_as_it_is_asked_to(tmp_path: Path) -> None:
    config = make_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    (tmp_path / "config.json").write_text(json.dumps(config))  # trained on 256 tokens
    long = {"prompt_token_ids": [5] * 300}

    def load(max_model_len: int | None) -> LLM:
        return LLM(str(tmp_path), load_format="dummy", device="cpu", max_model_len=max_model_len)

    with load(400) as llm:
        (output,) = llm.generate(long, params(max_tokens=1, ignore_eos=True), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 1
    with load(None) as llm, pytest.raises(InvalidRequestError, match="256 tokens"):
        llm.generate(long, params(), use_tqdm=False)
    with pytest.raises(ConfigError, match=r"max_model_len \(513\).*context \(512\)"):
        load(513)
