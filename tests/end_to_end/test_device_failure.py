"""A device that fails in mid-step: whoever waits is told, nobody hangs, and the server says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rapshee_engine import LLM, SamplingParams, _core
from rapshee_engine.engine.async_engine import AsyncEngine
from rapshee_engine.errors import EngineDeadError
from rapshee_engine.server.app import build_app
from rapshee_engine.server.registry import EngineRegistry
from rapshee_engine.server.settings import ServerSettings
from reference.fake_runner import EOS, make_library_tokenizer, make_tokenizer
from reference.tiny_llama import make_config

REASON = "an illegal memory access was encountered"
# Enough tokens that the failure comes before the end, and penalties, which need sampling states.
PARAMS = SamplingParams(
    max_tokens=20, seed=1, presence_penalty=0.5, ignore_eos=True, allowed_token_ids=range(200)
)
ModelRunner = _core.ModelRunner


class FailingRunner:
    """The native runner on a device that fails at the ``fail_at``-th call of one of its methods,
    and for good."""

    method = "collect"
    fail_at = 3
    made: list[FailingRunner]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = ModelRunner(*arguments, **options)
        self._num_calls = 0
        self.alive = True
        self.is_closed = False
        self.made.append(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        if not self.alive:
            raise _core.DeviceError("the device failed in an earlier step")
        if method == self.method:
            self._num_calls += 1
            if self._num_calls == self.fail_at:
                self.alive = False
                raise _core.DeviceError(REASON)
        return getattr(self._runner, method)(*arguments, **options)

    def launch(self, **arrays: Any) -> int:
        return int(self._call("launch", **arrays))

    def set_masks(self, *arguments: Any) -> None:
        self._call("set_masks", *arguments)

    def set_state(self, *arguments: Any) -> None:
        self._call("set_state", *arguments)

    def collect(self, ticket: int) -> Any:
        return self._call("collect", ticket)

    def close(self) -> None:
        self.is_closed = True
        self._runner.close()


@pytest.fixture
def model(tmp_path: Path) -> str:
    tokenizer = make_tokenizer()
    config = make_config(vocab_size=tokenizer.vocab_size, eos_token_id=EOS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    make_library_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


@pytest.fixture(autouse=True)
def runners(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FailingRunner]]:
    """Runners that were made. All are closed in the end."""
    made: list[FailingRunner] = []
    monkeypatch.setattr(FailingRunner, "made", made, raising=False)
    monkeypatch.setattr(_core, "ModelRunner", FailingRunner)
    yield made
    assert made
    assert all(runner.is_closed for runner in made)


ASYNC = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])


@ASYNC
@pytest.mark.parametrize(
    ("method", "fail_at"), [("collect", 3), ("launch", 3), ("set_masks", 2), ("set_state", 1)]
)
def test_every_request_of_a_call_ends(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    fail_at: int,
    async_scheduling: bool,
) -> None:
    monkeypatch.setattr(FailingRunner, "method", method)
    monkeypatch.setattr(FailingRunner, "fail_at", fail_at)
    with LLM(model=model, load_format="dummy", async_scheduling=async_scheduling) as llm:
        with pytest.raises(EngineDeadError, match=f"the device failed: {REASON}"):
            llm.generate(["a", "b", "c"], PARAMS, use_tqdm=False)
        assert not llm._engine.has_unfinished
        with pytest.raises(EngineDeadError, match=REASON):
            llm.generate("a", PARAMS, use_tqdm=False)


@ASYNC
def test_every_stream_ends(model: str, async_scheduling: bool) -> None:
    async def read(engine: AsyncEngine, prompt: str) -> None:
        async for _ in engine.generate(prompt, PARAMS):
            pass

    async def read_all(engine: AsyncEngine) -> list[BaseException | None]:
        return await asyncio.gather(*(read(engine, p) for p in "abc"), return_exceptions=True)

    with AsyncEngine(model=model, load_format="dummy", async_scheduling=async_scheduling) as engine:
        assert engine.is_ready
        for _ in range(2):  # those that were running, and those that come later
            for error in asyncio.run(read_all(engine)):
                assert isinstance(error, EngineDeadError)
                assert REASON in str(error)
        assert not engine.is_ready


@ASYNC
def test_every_answer_is_a_500_and_the_server_is_not_ready(
    model: str, async_scheduling: bool, caplog: pytest.LogCaptureFixture
) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 20,
        "logit_bias": {str(EOS): -100},
    }

    async def talk(app: Any) -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:

            async def chat(**options: Any) -> httpx.Response:
                return await client.post("/v1/chat/completions", json=body | options)

            assert (await client.get("/health/ready")).status_code == 200
            *whole, stream = await asyncio.gather(chat(), chat(seed=1), chat(stream=True))
            for answer in [*whole, await chat()]:
                assert answer.status_code == 500
                error = answer.json()["error"]
                assert error["type"] == "server_error"
                assert REASON not in error["message"]  # the operator reads it in the log
            # A stream that had begun says it in its last event.
            assert stream.status_code in (200, 500)
            assert '"server_error"' in stream.text.splitlines()[-1 if stream.is_error else -2]
            ready = await client.get("/health/ready")
            assert (ready.status_code, ready.json()["models"]) == (503, ["tiny"])
            assert (await client.get("/health/live")).status_code == 200

    with AsyncEngine(model=model, load_format="dummy", async_scheduling=async_scheduling) as engine:
        registry = EngineRegistry({"tiny": engine}, created=0, max_pending=8)
        asyncio.run(talk(build_app(registry, ServerSettings(), identify=None)))
    assert REASON in caplog.text
