"""The engine for asyncio: one thread runs the steps, any number of event loops read streams."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
import weakref
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.engine import Engine, RequestFailure
from rapshee_engine.engine.input_processor import Prompt
from rapshee_engine.engine.output_processor import RequestGroup
from rapshee_engine.engine.outputs import CompletionOutput, RequestOutput
from rapshee_engine.engine.stats import EngineStats
from rapshee_engine.errors import (
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    RapsheeError,
)
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.tokenizer.chat_template import ChatTemplate
from rapshee_engine.tokenizer.tokenizer import Tokenizer

__all__ = ["AsyncEngine"]

_STALL_SECONDS = 30.0
"""A step loop that has work and did not turn for that long counts as stuck. The longest honest step
(a full budget of prefill on a slow machine) takes a few seconds."""


class AsyncEngine:
    """An engine with a thread of its own. Its methods may be called from any thread.

    ::

        async with AsyncEngine(model="model.gguf") as engine:
            async for output in engine.generate("Hello", SamplingParams(max_tokens=32)):
                print(output.outputs[0].text)

    It is closed by `close`, by ``with`` or ``async with``, when it is collected as garbage, and at
    interpreter exit.
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Load the model and start. ``options`` are those of `EngineConfig`.

        Raises:
            ConfigError, WeightFileError, UnsupportedModelError: the model cannot be loaded so.
        """
        self._start(Engine.from_config(EngineConfig(model=model, **options)))

    @classmethod
    def from_engine(cls, engine: Engine) -> AsyncEngine:
        """Run an engine that is made already, and own it from now on."""
        self = cls.__new__(cls)
        self._start(engine)
        return self

    def _start(self, engine: Engine) -> None:
        self._loop = _StepLoop(engine)
        self._tokenizing = ThreadPoolExecutor(2, thread_name_prefix="rapshee-tokenize")
        # The thread is a daemon with an exit hook: a thread that is none would be waited for before
        # any hook could tell it to stop, and an engine nobody closed would keep the process alive.
        thread = threading.Thread(target=self._loop.run, name="rapshee-engine", daemon=True)
        self._thread = thread
        self._finalizer = weakref.finalize(self, _shut_down, self._loop, thread, self._tokenizing)
        thread.start()

    # Facts

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loop.engine.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template, None if it has none."""
        return self._loop.engine.chat_template

    @property
    def config(self) -> EngineConfig:
        return self._loop.engine.config

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._loop.engine.input_processor.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._loop.engine.max_model_len

    @property
    def fingerprint(self) -> str:
        """``fp_`` and a digest of build, device and weights."""
        return self._loop.fingerprint

    @property
    def stats(self) -> EngineStats:
        return self._loop.engine.stats

    @property
    def is_ready(self) -> bool:
        """Whether a request would be served: weights loaded, thread alive, steps moving."""
        return self._thread.is_alive() and self._loop.is_moving

    # Requests

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's outputs as they come. Leaving the iteration early aborts the request.

        A reader that is slower than the engine gets several steps in one output.

        Raises (at the first output):
            InvalidRequestError: the request cannot be served as asked.
            EngineClosedError, EngineDeadError: nor any other.
            StepError: a step that computed it failed.
        """
        if not self._thread.is_alive():  # closed, or this is a forked child, which has no threads
            raise EngineClosedError("the engine is closed, or belongs to the parent process")
        stream = _Stream(asyncio.get_running_loop(), sampling_params.output_kind)
        request_id = uuid.uuid4().hex if request_id is None else request_id
        group = await self._process(request_id, prompt, sampling_params, cache_salt)
        self._loop.add(group, stream)
        try:
            finished = False
            while not finished:
                output = await stream.next()
                finished = output.finished
                yield output
        finally:
            self._loop.leave(request_id, stream)

    def abort(self, request_id: str) -> None:
        """End a request; the last output of its stream says ``abort``. Unknown ids are ignored."""
        self._loop.abort(request_id)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, by the model's chat template. Blocks; call it off the loop.

        Raises:
            InvalidRequestError: the model has no chat template, or the template refuses.
        """
        return self._loop.engine.render_chat(messages, add_generation_prompt=add_generation_prompt)

    async def _process(
        self, request_id: str, prompt: Prompt, sampling_params: SamplingParams, cache_salt: str
    ) -> RequestGroup:
        """Check the request; text is tokenised off the event loop."""
        process = self._loop.engine.input_processor.process
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            return process(request_id, prompt, sampling_params, cache_salt=cache_salt)
        try:
            future = self._tokenizing.submit(
                process, request_id, prompt, sampling_params, cache_salt=cache_salt
            )
        except RuntimeError as error:  # the executor was shut down
            raise EngineClosedError("the engine is closed") from error
        return await asyncio.wrap_future(future)

    # End

    def close(self) -> None:
        """Stop, fail what is unfinished with `EngineClosedError`, give all memory back. Idempotent;
        blocks for at most one step."""
        self._finalizer()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)


def _shut_down(loop: _StepLoop, thread: threading.Thread, tokenizing: ThreadPoolExecutor) -> None:
    if thread.is_alive():  # a forked child has no copy of it, and perhaps one of a lock it held
        loop.stop()
    tokenizing.shutdown(wait=False)
    if thread is not threading.current_thread():  # garbage may be collected anywhere
        thread.join()


class _Stream:
    """Outputs of one request on their way to its reader. Lives on the reader's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, kind: RequestOutputKind) -> None:
        self.loop = loop
        self._kind = kind
        self._output: RequestOutput | None = None
        self._error: RapsheeError | None = None
        self._ready = asyncio.Event()

    def put(self, event: RequestOutput | RequestFailure) -> None:
        if isinstance(event, RequestFailure):
            self._error = event.error
        elif self._output is None or self._kind is not RequestOutputKind.DELTA:
            self._output = event
        else:
            self._output = _merged(self._output, event)
        self._ready.set()

    async def next(self) -> RequestOutput:
        while self._output is None:
            if self._error is not None:
                raise self._error
            await self._ready.wait()
            self._ready.clear()
        output, self._output = self._output, None
        return output


_Delivery = tuple[_Stream, RequestOutput | RequestFailure]


def _merged(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Two consecutive deltas as one."""
    outputs = {output.index: output for output in first.outputs}
    for output in second.outputs:
        before = outputs.get(output.index)
        outputs[output.index] = output if before is None else _merged_completion(before, output)
    second.outputs = list(outputs.values())
    if second.prompt_logprobs is None:
        second.prompt_logprobs = first.prompt_logprobs
    return second


def _merged_completion(first: CompletionOutput, second: CompletionOutput) -> CompletionOutput:
    second.text = first.text + second.text
    second.token_ids = first.token_ids + second.token_ids
    if first.logprobs is not None and second.logprobs is not None:
        second.logprobs = first.logprobs + second.logprobs
    return second


class _StepLoop:
    """The engine thread: takes commands, steps, hands outputs over. Knows no `AsyncEngine`, so that
    one which nobody holds any more can be collected and closed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.fingerprint = engine.fingerprint
        self._streams: dict[str, _Stream] = {}  # of requests not finished; under the lock
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._is_busy = False
        self._turned_at = time.monotonic()

    @property
    def is_moving(self) -> bool:
        """Whether the engine lives and the loop waits for work or turned not long ago."""
        if self._is_stopping or self.engine.dead is not None:
            return False
        return not self._is_busy or time.monotonic() - self._turned_at < _STALL_SECONDS

    # Called from any thread

    def add(self, group: RequestGroup, stream: _Stream) -> None:
        with self._changed:
            if self._is_stopping:
                raise EngineClosedError("the engine is closed")
            if self.engine.dead is not None:
                raise EngineDeadError(str(self.engine.dead)) from self.engine.dead
            if group.request_id in self._streams:
                raise InvalidRequestError(
                    f"request id {group.request_id!r} is in use", param="request_id"
                )
            self._streams[group.request_id] = stream
            self._post(lambda: self._add(group))

    def abort(self, request_id: str) -> None:
        with self._changed:
            self._post(lambda: self.engine.abort(request_id))

    def leave(self, request_id: str, stream: _Stream) -> None:
        """The reader of ``stream`` has gone; whatever is unfinished of its request is aborted."""
        with self._changed:
            if self._streams.get(request_id) is stream:
                self._post(lambda: self.engine.abort(request_id))

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._changed.notify()

    # The thread

    def run(self) -> None:
        """Step until stopped, then close the engine."""
        try:
            while self._take_commands():
                self._deliver(self.engine.step())
        finally:
            self._close()

    def _take_commands(self) -> bool:
        """Run what was posted; wait if there is nothing else to do. False: stop."""
        with self._changed:
            self._is_busy = False
            while not (self._commands or self._is_stopping or self.engine.has_unfinished):
                self._changed.wait()
            self._turned_at = time.monotonic()
            self._is_busy = True
            commands, self._commands = self._commands, deque()
            stopping = self._is_stopping
        for command in commands:
            command()
        return not stopping

    def _add(self, group: RequestGroup) -> None:
        try:
            self.engine.add(group)
        except RapsheeError as error:
            self._deliver([RequestFailure(group.request_id, error)])

    def _deliver(self, events: Sequence[RequestOutput | RequestFailure]) -> None:
        """One call into each event loop that has readers of these events."""
        batches: dict[asyncio.AbstractEventLoop, list[_Delivery]] = defaultdict(list)
        for event in events:
            is_last = isinstance(event, RequestFailure) or event.finished
            with self._changed:
                stream = self._streams.get(event.request_id)
                if stream is not None and is_last:
                    del self._streams[event.request_id]
            if stream is not None:
                batches[stream.loop].append((stream, event))
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the loop was closed under its readers
                for _, event in batch:
                    self.engine.abort(event.request_id)

    def _close(self) -> None:
        with self._changed:
            self._is_stopping = True
            request_ids = list(self._streams)
        error = EngineClosedError("the engine was closed")
        self._deliver([RequestFailure(request_id, error) for request_id in request_ids])
        self.engine.close()


def _put_all(batch: list[_Delivery]) -> None:
    for stream, event in batch:
        stream.put(event)
