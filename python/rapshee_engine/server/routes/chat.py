"""``POST /v1/chat/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.errors import ContextLengthError, StepError
from rapshee_engine.server.answers import AnswerHeader
from rapshee_engine.server.body import read_json_body
from rapshee_engine.server.disconnect import until_disconnect
from rapshee_engine.server.errors import error_json, to_api_error
from rapshee_engine.server.fields import UnknownFieldLog
from rapshee_engine.server.registry import EngineRegistry, ServedModel
from rapshee_engine.server.request_facts import request_facts
from rapshee_engine.server.responses import ChunkWriter, chat_completion
from rapshee_engine.server.schemas import ChatRequest, parse_chat_request
from rapshee_engine.server.settings import ServerSettings
from rapshee_engine.server.sse import EventStream, event

__all__ = ["ChatEndpoints"]


class ChatEndpoints:
    """Parses, hands to the engine, writes the answer."""

    def __init__(self, registry: EngineRegistry, settings: ServerSettings) -> None:
        self._registry = registry
        self._max_body_bytes = settings.max_body_bytes
        self._unknown_fields = UnknownFieldLog()

    def routes(self) -> list[Route]:
        return [Route("/v1/chat/completions", self.create, methods=["POST"])]

    async def create(self, request: Request) -> Response:
        body = await read_json_body(request, max_bytes=self._max_body_bytes)
        chat = parse_chat_request(body, self._unknown_fields)
        model = self._registry.get(chat.model)
        top_logprobs = chat.top_logprobs or 0
        header = AnswerHeader(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=model.name,
            system_fingerprint=model.slot.engine.fingerprint,
        )
        outputs = _outputs(model, chat, header.id)
        if not chat.stream:
            output = await until_disconnect(request.receive, _last(outputs))
            answer = chat_completion(header, output, top_logprobs=top_logprobs)
            return Response(answer, media_type="application/json")
        # The first output is awaited before the status goes out, so that a request that the
        # engine refuses gets its proper status.
        first = await until_disconnect(request.receive, anext(outputs))
        writer = ChunkWriter(
            header,
            n=chat.num_completions,
            include_usage=chat.include_usage,
            top_logprobs=top_logprobs,
        )
        return EventStream(_events(request, writer, first, outputs))


async def _outputs(
    model: ServedModel, chat: ChatRequest, request_id: str
) -> AsyncGenerator[RequestOutput, None]:
    """What the engine yields for a request, which holds its place until this is closed."""
    engine = model.slot.engine
    facts = request_facts()
    facts.model = model.name
    with model.slot.admit(chat.num_completions):
        prompt = await asyncio.to_thread(engine.render_chat, chat.template_messages())
        ContextLengthError.check(
            len(prompt), chat.completion_limit, engine.max_model_len, param="messages"
        )
        stream = engine.generate(
            {"prompt_token_ids": prompt, "is_chat": True},
            chat.sampling_params(),
            request_id=request_id,
        )
        async with aclosing(stream):
            finished = False
            async for output in stream:
                finished = output.finished
                facts.observe(output)
                yield output
    if not finished:
        raise StepError("the engine ended a request early")


async def _last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    async with aclosing(outputs):
        last = await anext(outputs)
        async for output in outputs:
            last = output
        return last


async def _events(
    request: Request,
    writer: ChunkWriter,
    first: RequestOutput,
    outputs: AsyncGenerator[RequestOutput, None],
) -> AsyncGenerator[list[bytes], None]:
    """Batches of events; an error becomes the last one."""
    async with aclosing(outputs):
        try:
            yield writer.start() + writer.continuation(first)
            async for output in outputs:
                yield writer.continuation(output)
        except Exception as error:
            yield [event(error_json(to_api_error(error, request.scope)))]
