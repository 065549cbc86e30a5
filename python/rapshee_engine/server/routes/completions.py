"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.errors import ContextLengthError, InvalidRequestError, StepError
from rapshee_engine.server.answers import AnswerHeader
from rapshee_engine.server.body import read_json_body
from rapshee_engine.server.completion_responses import TextChunkWriter, TextCompletion
from rapshee_engine.server.completion_schemas import (
    CompletionRequest,
    GivenPrompt,
    parse_completion_request,
)
from rapshee_engine.server.disconnect import until_disconnect
from rapshee_engine.server.errors import error_json, to_api_error
from rapshee_engine.server.fields import UnknownFieldLog
from rapshee_engine.server.merge import merged
from rapshee_engine.server.registry import EngineRegistry, ServedModel, ServingEngine
from rapshee_engine.server.request_facts import request_facts
from rapshee_engine.server.settings import ServerSettings
from rapshee_engine.server.sse import EventStream, event
from rapshee_engine.tokenizer.tokenizer import reject_lone_surrogates

__all__ = ["CompletionEndpoints"]

T = TypeVar("T")
Batch = list[tuple[int, RequestOutput]]


class CompletionEndpoints:
    """Parses, hands every prompt to the engine, writes the answer."""

    def __init__(self, registry: EngineRegistry, settings: ServerSettings) -> None:
        self._registry = registry
        self._max_body_bytes = settings.max_body_bytes
        self._unknown_fields = UnknownFieldLog()

    def routes(self) -> list[Route]:
        return [Route("/v1/completions", self.create, methods=["POST"])]

    async def create(self, request: Request) -> Response:
        body = await read_json_body(request, max_bytes=self._max_body_bytes)
        asked = parse_completion_request(body, self._unknown_fields)
        model = self._registry.get(asked.model)
        engine = model.slot.engine
        header = AnswerHeader(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=model.name,
            system_fingerprint=engine.fingerprint,
        )
        outputs = _outputs(model, asked, header.id)
        if not asked.stream:
            answer = TextCompletion(header, asked, engine.tokenizer)
            whole = await until_disconnect(request.receive, _whole(answer, outputs))
            return Response(whole, media_type="application/json")
        # The first outputs are awaited before the status goes out, so that a request that the
        # engine refuses gets its proper status.
        first = await until_disconnect(request.receive, anext(outputs))
        writer = TextChunkWriter(header, asked, engine.tokenizer)
        return EventStream(_events(request, writer, first, outputs))


async def _outputs(
    model: ServedModel, asked: CompletionRequest, request_id: str
) -> AsyncGenerator[Batch, None]:
    """What the engine yields for the prompts, which hold their places until this is closed."""
    engine, prompts = model.slot.engine, asked.prompts()
    facts = request_facts()
    facts.model = model.name
    with model.slot.admit(len(prompts) * asked.num_completions):
        token_ids = await asyncio.to_thread(_tokenized, engine, prompts, asked.completion_limit)
        streams = [
            engine.generate(
                {"prompt_token_ids": ids},
                asked.sampling_params(),
                request_id=f"{request_id}-{index}",
            )
            for index, ids in enumerate(token_ids)
        ]
        num_finished = 0
        async with aclosing(merged(streams)) as batches:
            async for batch in batches:
                for _, output in batch:
                    num_finished += output.finished
                    facts.observe(output)
                yield batch
    if num_finished < len(prompts):
        raise StepError("the engine ended a request early")


def _tokenized(
    engine: ServingEngine, prompts: Sequence[GivenPrompt], max_tokens: int
) -> list[list[int]]:
    """Token ids of each prompt. All are checked before the first is computed.

    Raises:
        InvalidRequestError: a prompt is empty, outside the vocabulary or too long; it is named.
    """
    all_ids = []
    for prompt in prompts:
        if isinstance(prompt.content, str):
            token_ids = _encode(engine, prompt.content, prompt.path)
        else:
            token_ids = prompt.content
            _check_vocabulary(token_ids, engine.vocab_size, prompt.path)
        ContextLengthError.check(
            len(token_ids), max_tokens, engine.max_model_len, param=prompt.path
        )
        all_ids.append(token_ids)
    return all_ids


def _encode(engine: ServingEngine, text: str, path: str) -> list[int]:
    engine.tokenizer.require_vocabulary("a text", path)
    reject_lone_surrogates(text, path)
    token_ids = engine.tokenizer.encode(text)
    if not token_ids:
        raise InvalidRequestError(f"'{path}' must not be empty", param=path)
    return token_ids


def _check_vocabulary(token_ids: Sequence[int], vocab_size: int, path: str) -> None:
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"Invalid '{path}.{index}': token id {token_id} is outside the vocabulary (0 to "
                f"{vocab_size - 1})",
                param=f"{path}.{index}",
            )


async def _whole(answer: TextCompletion, outputs: AsyncGenerator[Batch, None]) -> bytes:
    async with aclosing(outputs):
        async for batch in outputs:
            await _written(answer.take, batch)
    return answer.body()


async def _events(
    request: Request,
    writer: TextChunkWriter,
    first: Batch,
    outputs: AsyncGenerator[Batch, None],
) -> AsyncGenerator[list[bytes], None]:
    """Batches of events; an error becomes the last one."""
    async with aclosing(outputs):
        try:
            yield await _written(writer.continuation, first)
            async for batch in outputs:
                yield await _written(writer.continuation, batch)
            yield writer.end()
        except Exception as error:
            yield [event(error_json(to_api_error(error, request.scope)))]


async def _written(write: Callable[[Batch], T], batch: Batch) -> T:
    """What ``write`` makes of a batch; off the event loop where it holds scored prompts, which may
    be as long as the context."""
    if any(output.prompt_logprobs is not None for _, output in batch):
        return await asyncio.to_thread(write, batch)
    return write(batch)
