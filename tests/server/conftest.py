"""A deterministic engine, and ways to send requests to the application around it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from rapshee_engine.engine.async_engine import AsyncEngine
from rapshee_engine.engine.outputs import CompletionOutput, Logprob, RequestOutput
from rapshee_engine.engine.stats import EngineStats
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.server.app import build_app
from rapshee_engine.server.drain import Drain
from rapshee_engine.server.registry import EngineRegistry, ServingEngine
from rapshee_engine.server.serve import HttpServer, bind
from rapshee_engine.server.settings import ServerSettings
from reference.fake_runner import make_engine, make_tokenizer

CREATED = 1_700_000_000
KEY = "test-key"
REAL_OPTIONS: dict[str, Any] = {"num_blocks": 256, "max_num_batched_tokens": 16}
VOCABULARY = ("The", " moon", " is", " a", " grey", " caf\u00e9", "!")


class FakeEngine:
    """Says the words of its vocabulary in turn, completion ``i`` starting at word ``i``.

    A message's words are its tokens. Tests set what should go wrong and read what was asked.
    """

    def __init__(self) -> None:
        self.max_model_len = 32
        self.fingerprint = "fp_fake"
        self.is_ready = True
        self.stats = EngineStats()
        self.tokenizer = make_tokenizer()  # of text completions
        self.vocab_size = 258
        self.num_cached_tokens = 0
        self.conversations: list[Sequence[Mapping[str, Any]]] = []
        self.params: list[SamplingParams] = []
        self.request_ids: list[str | None] = []
        # Called before token i of a request; may raise, or wait.
        self.before_token: Callable[[int], Any] = lambda _index: asyncio.sleep(0)
        self.finish_reason: str | None = None
        self.ended = threading.Event()
        self.closing = threading.Event()

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        self.conversations.append(messages)
        return list(range(sum(len(message["content"].split()) for message in messages)))

    async def generate(
        self,
        prompt: Mapping[str, Any],
        sampling_params: SamplingParams,
        *,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        self.params.append(sampling_params)
        self.request_ids.append(request_id)
        prompt_ids = prompt["prompt_token_ids"]
        asked = sampling_params.max_tokens
        length = len(VOCABULARY) if asked is None else asked
        steps = [
            [self._completion(i, token, length, sampling_params) for i in range(sampling_params.n)]
            for token in range(length)
        ]
        try:
            for index, outputs in enumerate(steps):
                await self.before_token(index)
                if sampling_params.output_kind is RequestOutputKind.DELTA:
                    yield self._output(prompt_ids, outputs, finished=index == length - 1)
            if sampling_params.output_kind is RequestOutputKind.FINAL_ONLY:
                yield self._output(
                    prompt_ids, [merge(c) for c in zip(*steps, strict=True)], finished=True
                )
        finally:
            self.ended.set()

    def _output(
        self, prompt_ids: list[int], outputs: list[CompletionOutput], *, finished: bool
    ) -> RequestOutput:
        return RequestOutput(
            request_id="",
            prompt=None,
            prompt_token_ids=prompt_ids,
            outputs=outputs,
            finished=finished,
            num_cached_tokens=self.num_cached_tokens,
        )

    def _completion(
        self, index: int, token: int, length: int, params: SamplingParams
    ) -> CompletionOutput:
        token_id = (index + token) % len(VOCABULARY)
        last = token == length - 1
        reason = "stop" if params.max_tokens is None else "length"
        return CompletionOutput(
            index=index,
            text=VOCABULARY[token_id],
            token_ids=[token_id],
            logprobs=None if params.logprobs is None else [ranked(token_id, params.logprobs)],
            finish_reason=(self.finish_reason or reason) if last else None,
            num_tokens=token + 1,
        )


def ranked(chosen: int, count: int) -> dict[int, Logprob]:
    """The chosen token, which has rank 2, and the ``count`` best ones."""
    best = [(chosen + 1) % len(VOCABULARY), chosen, *range(100, 120)]
    ranks = {token: rank for rank, token in enumerate(best, start=1)}
    return {token: logprob(token, ranks[token]) for token in dict.fromkeys([chosen, *best[:count]])}


def logprob(token: int, rank: int) -> Logprob:
    text = VOCABULARY[token] if token < len(VOCABULARY) else "\ufffd"
    raw = text.encode() if token < len(VOCABULARY) else b"\xe2\x80"
    value = float("-inf") if rank > 20 else -float(rank)
    return Logprob(logprob=value, rank=rank, decoded_token=text, token_bytes=raw)


def merge(parts: Sequence[CompletionOutput]) -> CompletionOutput:
    first, last = parts[0], parts[-1]
    logprobs = [entry for part in parts for entry in part.logprobs or ()]
    return CompletionOutput(
        index=first.index,
        text="".join(part.text for part in parts),
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=None if first.logprobs is None else logprobs,
        finish_reason=last.finish_reason,
        num_tokens=last.num_tokens,
    )


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def real() -> Iterator[AsyncEngine]:
    """A whole engine, without a model: what it draws depends on all that a model would read."""
    with AsyncEngine.from_engine(make_engine(**REAL_OPTIONS)) as engine:
        yield engine


@pytest.fixture
def make_app(engine: FakeEngine) -> Callable[..., Any]:
    """An application that serves the engine as ``fake`` and ``fake-mini``, or others."""

    def make(
        *,
        auth: bool = True,
        max_pending: int = 64,
        drain: Drain | None = None,
        engines: Mapping[str, ServingEngine] | None = None,
        **settings: Any,
    ) -> Any:
        engines = engines or {"fake": engine, "fake-mini": engine}
        registry = EngineRegistry(engines, created=CREATED, max_pending=max_pending)
        identify = (lambda key: "id" if key == KEY else None) if auth else None
        return build_app(registry, ServerSettings(**settings), identify=identify, drain=drain)

    return make


@pytest.fixture
def send(make_app: Callable[..., Any]) -> Callable[..., httpx.Response]:
    """Sends one request, by default with a good key, to a fresh or given application."""

    def send_request(
        method: str, path: str, *, app: Any = None, key: str | None = KEY, **options: Any
    ) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        headers.update(options.pop("headers", {}))

        async def exchange() -> httpx.Response:
            transport = httpx.ASGITransport(app or make_app(), raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                return await http.request(method, path, headers=headers, **options)

        return asyncio.run(exchange())

    return send_request


@pytest.fixture
def chat(send: Callable[..., httpx.Response]) -> Callable[..., httpx.Response]:
    """Asks for a chat completion; keywords are fields of the request."""

    def ask(**fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "What is the moon?"}]
        body = {"model": "fake", "messages": messages, **fields}
        return send("POST", "/v1/chat/completions", json=body)

    return ask


@pytest.fixture
def refusal(chat: Callable[..., httpx.Response]) -> Callable[..., dict[str, Any]]:
    """The error object of a chat request that must get a 400."""

    def refused(**fields: Any) -> dict[str, Any]:
        response = chat(**fields)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        return dict(error)

    return refused


@pytest.fixture
def live_server(make_app: Callable[..., Any], engine: FakeEngine) -> Callable[..., Any]:
    """Context manager: the application behind the real HTTP server; yields server and port. At the
    end it drains."""

    @contextmanager
    def running(
        *, engines: Mapping[str, ServingEngine] | None = None, **options: Any
    ) -> Iterator[tuple[HttpServer, int]]:
        settings = ServerSettings(**options)
        drain = Drain()
        listening = threading.Event()
        with bind("127.0.0.1", 0) as listener:
            server = HttpServer(
                make_app(engines=engines, max_body_bytes=settings.max_body_bytes, drain=drain),
                settings,
                drain=drain,
                on_listening=listening.set,
                end_requests=engine.closing.set,
            )
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            port = listener.getsockname()[1]
            thread.start()
            try:
                assert listening.wait(30)
                yield server, port
            finally:
                if not drain.is_draining:
                    server.handle_exit(signal.SIGTERM, None)
                thread.join()

    return running


@pytest.fixture
def live(live_server: Callable[..., Any]) -> Callable[..., Any]:
    """Context manager: the application behind the real HTTP server; yields its port."""

    @contextmanager
    def running(**options: Any) -> Iterator[int]:
        with live_server(**options) as (_, port):
            yield port

    return running
