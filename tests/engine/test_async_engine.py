from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from rapshee_engine.engine.async_engine import AsyncEngine
from rapshee_engine.engine.engine import Engine
from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.errors import (
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    StepError,
)
from rapshee_engine.llm import LLM
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from reference.fake_runner import FakeRunner, FakeStepOutput, make_engine

PROMPT = {"prompt_token_ids": [5, 6, 7, 8, 9]}
FINAL = RequestOutputKind.FINAL_ONLY


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "seed": 1, **options})


class GatedRunner:
    """A `FakeRunner` whose steps end only while the gate is open."""

    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner
        self.gate = threading.Event()
        self.entered = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def collect(self, ticket: int) -> FakeStepOutput:
        self.entered.set()
        assert self.gate.wait(30), "the test never opened the gate"
        return self._runner.collect(ticket)


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    with AsyncEngine.from_engine(make_engine()) as engine:
        yield engine


@pytest.fixture
def gated() -> Iterator[tuple[AsyncEngine, GatedRunner]]:
    inner = make_engine()
    runner = GatedRunner(inner.runner)  # type: ignore[arg-type]
    inner.runner = runner  # type: ignore[assignment]
    with AsyncEngine.from_engine(inner) as engine:
        yield engine, runner
        runner.gate.set()


async def read(engine: AsyncEngine, prompt: Any = PROMPT, **options: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params(**options))]


def idle(inner: Engine) -> bool:
    return not inner.has_unfinished and inner.scheduler.kv_cache.pools[0].num_free == 64


async def until_idle(engine: AsyncEngine) -> None:
    """Wait until nothing of the requests before is left in the engine."""
    while not idle(engine._loop.engine):
        await asyncio.sleep(0)


def test_a_stream_yields_what_the_engine_does(engine: AsyncEngine) -> None:
    (final,) = asyncio.run(read(engine, output_kind=FINAL))
    with LLM.from_engine(make_engine()) as llm:
        (expected,) = llm.generate(PROMPT, params(), use_tqdm=False)
    assert final.outputs == expected.outputs


def test_text_is_a_prompt_too(engine: AsyncEngine) -> None:
    (final,) = asyncio.run(read(engine, "hello", output_kind=FINAL))
    assert final.prompt == "hello"
    assert final.prompt_token_ids == engine.tokenizer.encode("hello")


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_every_kind_of_stream_tells_the_same(engine: AsyncEngine, kind: RequestOutputKind) -> None:
    outputs = asyncio.run(read(engine, output_kind=kind, n=2, logprobs=1))
    (expected,) = asyncio.run(read(engine, output_kind=FINAL, n=2, logprobs=1))
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    for index, whole in enumerate(expected.outputs):
        parts = [c for o in outputs for c in o.outputs if c.index == index]
        if kind is RequestOutputKind.DELTA:
            assert "".join(c.text for c in parts) == whole.text
            assert [t for c in parts for t in c.token_ids] == whole.token_ids
            assert [e for c in parts for e in c.logprobs or ()] == whole.logprobs
        assert parts[-1].num_tokens == 8
        assert parts[-1].finish_reason == "length"


def test_64_streams_equal_their_solo_runs(engine: AsyncEngine) -> None:
    async def all_at_once() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(read(engine, seed=i, output_kind=FINAL) for i in range(64)))

    together = asyncio.run(all_at_once())
    for i in (0, 31, 63):
        (alone,) = asyncio.run(read(engine, seed=i, output_kind=FINAL))
        assert together[i][0].outputs == alone.outputs


def test_a_slow_reader_gets_deltas_merged(engine: AsyncEngine) -> None:
    async def slowly() -> tuple[list[RequestOutput], list[RequestOutput]]:
        delta = params(output_kind=RequestOutputKind.DELTA, logprobs=0, prompt_logprobs=0)
        stream = engine.generate(PROMPT, delta)
        outputs = [await anext(stream)]
        await until_idle(engine)
        await asyncio.sleep(0)  # let the last hand-over in
        outputs += [output async for output in stream]
        return outputs, await read(engine, output_kind=FINAL, logprobs=0, prompt_logprobs=0)

    outputs, (expected,) = asyncio.run(slowly())
    assert len(outputs) <= 2
    parts = [output.outputs[0] for output in outputs]
    assert [t for part in parts for t in part.token_ids] == expected.outputs[0].token_ids
    assert "".join(part.text for part in parts) == expected.outputs[0].text
    assert [e for part in parts for e in part.logprobs or ()] == expected.outputs[0].logprobs
    assert outputs[0].prompt_logprobs == expected.prompt_logprobs


def test_leaving_a_stream_aborts_its_request(engine: AsyncEngine) -> None:
    async def leave() -> None:
        stream = engine.generate(PROMPT, params(max_tokens=50, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        await until_idle(engine)

    asyncio.run(leave())
    assert engine.stats.finished["abort"] + engine.stats.finished["length"] == 1


def test_cancelling_a_reader_aborts_its_request(
    gated: tuple[AsyncEngine, GatedRunner],
) -> None:
    engine, runner = gated

    async def cancel() -> None:
        task = asyncio.create_task(read(engine, max_tokens=50))
        await asyncio.to_thread(runner.entered.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        runner.gate.set()
        await until_idle(engine)

    asyncio.run(cancel())
    assert engine.stats.finished["abort"] == 1


def test_an_aborted_stream_ends_with_abort(gated: tuple[AsyncEngine, GatedRunner]) -> None:
    engine, runner = gated

    async def abort() -> RequestOutput:
        stream = engine.generate(PROMPT, params(max_tokens=50), request_id="mine")
        task = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(runner.entered.wait)
        engine.abort("mine")
        engine.abort("unknown")
        runner.gate.set()
        outputs = [await task] + [output async for output in stream]
        return outputs[-1]

    last = asyncio.run(abort())
    assert last.finished
    assert last.outputs[0].finish_reason == "abort"


@pytest.mark.parametrize(
    "prompt", ["", {"prompt_token_ids": []}, {"prompt_token_ids": [-1]}, {"other": 1}, "\ud800"]
)
def test_a_bad_prompt_is_refused_and_the_engine_goes_on(engine: AsyncEngine, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError):
        asyncio.run(read(engine, prompt))
    assert asyncio.run(read(engine))[-1].finished


def test_an_id_in_use_is_refused(gated: tuple[AsyncEngine, GatedRunner]) -> None:
    engine, runner = gated

    async def twice() -> None:
        first = asyncio.ensure_future(anext(engine.generate(PROMPT, params(), request_id="same")))
        await asyncio.to_thread(runner.entered.wait)
        with pytest.raises(InvalidRequestError, match="in use"):
            await anext(engine.generate(PROMPT, params(), request_id="same"))
        runner.gate.set()
        await first

    asyncio.run(twice())


def test_a_failed_step_raises_in_its_readers_and_the_engine_goes_on(engine: AsyncEngine) -> None:
    engine._loop.engine.runner.collect_errors[2] = StepError("on demand")  # type: ignore[attr-defined]
    with pytest.raises(StepError, match="on demand"):
        asyncio.run(read(engine))
    assert engine.is_ready
    assert asyncio.run(read(engine))[-1].finished


def test_a_dead_engine_raises_everywhere_and_is_not_ready(engine: AsyncEngine) -> None:
    engine._loop.engine.runner.collect_errors[2] = EngineDeadError("gone")  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="gone"):
            asyncio.run(read(engine))
    assert not engine.is_ready


def test_it_is_ready_while_steps_move(
    gated: tuple[AsyncEngine, GatedRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner = gated
    assert engine.is_ready

    async def stall() -> None:
        task = asyncio.create_task(read(engine))
        await asyncio.to_thread(runner.entered.wait)
        assert engine.is_ready
        monkeypatch.setattr("rapshee_engine.engine.async_engine._STALL_SECONDS", 0.0)
        assert not engine.is_ready
        monkeypatch.undo()
        runner.gate.set()
        await task

    asyncio.run(stall())
    assert engine.is_ready


def test_several_event_loops_are_served_at_once(engine: AsyncEngine) -> None:
    results: dict[int, list[RequestOutput]] = {}

    def run(seed: int) -> None:
        results[seed] = asyncio.run(read(engine, seed=seed, output_kind=FINAL))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert (
            results[seed][0].outputs
            == asyncio.run(read(engine, seed=seed, output_kind=FINAL))[0].outputs
        )


def test_an_event_loop_that_closes_under_its_streams_harms_nobody(
    gated: tuple[AsyncEngine, GatedRunner],
) -> None:
    engine, runner = gated
    loop = asyncio.new_event_loop()
    stream = engine.generate(PROMPT, params(max_tokens=50))
    reader = loop.create_task(anext(stream))  # type: ignore[arg-type]
    loop.run_until_complete(asyncio.sleep(0))
    assert runner.entered.wait(30)
    loop.close()
    runner.gate.set()
    assert asyncio.run(read(engine))[-1].finished
    assert not reader.done()
    reader._log_destroy_pending = False  # type: ignore[attr-defined]  # the point of this test


def test_closing_under_load_ends_every_stream(gated: tuple[AsyncEngine, GatedRunner]) -> None:
    engine, runner = gated

    async def close() -> list[Any]:
        tasks = [asyncio.create_task(read(engine, max_tokens=50)) for _ in range(16)]
        await asyncio.to_thread(runner.entered.wait)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.sleep(0)
        runner.gate.set()
        await closing
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(close())
    assert len(results) == 16
    assert all(isinstance(result, EngineClosedError) for result in results)


def test_a_closed_engine_gives_everything_back_and_serves_nobody() -> None:
    inner = make_engine()
    engine = AsyncEngine.from_engine(inner)
    engine.close()
    engine.close()
    assert inner.runner.is_closed  # type: ignore[attr-defined]
    assert not engine.is_ready
    for prompt in (PROMPT, "text"):
        with pytest.raises(EngineClosedError):
            asyncio.run(read(engine, prompt))


def test_async_with_closes() -> None:
    inner = make_engine()

    async def use() -> None:
        async with AsyncEngine.from_engine(inner) as engine:
            await read(engine)

    asyncio.run(use())
    assert inner.runner.is_closed  # type: ignore[attr-defined]


def test_an_engine_nobody_holds_is_closed() -> None:
    inner = make_engine()
    engine = AsyncEngine.from_engine(inner)
    asyncio.run(read(engine))
    thread, gone = engine._thread, weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert not thread.is_alive()
    assert inner.runner.is_closed  # type: ignore[attr-defined]


def test_no_thread_is_left() -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        with AsyncEngine.from_engine(make_engine()) as engine:
            asyncio.run(read(engine, "some text"))
            tokenizing = engine._tokenizing
        tokenizing.shutdown(wait=True)
    assert set(threading.enumerate()) == before


def test_facts(engine: AsyncEngine) -> None:
    assert engine.max_model_len == 64
    assert engine.fingerprint == engine._loop.engine.fingerprint
    assert engine.chat_template is not None
    assert engine.config.max_num_seqs == 8
    ids = engine.render_chat([{"role": "user", "content": "hi"}])
    assert ids == engine._loop.engine.render_chat([{"role": "user", "content": "hi"}])
