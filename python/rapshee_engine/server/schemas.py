"""The chat-completion request: its fields, their bounds, and what is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.server.errors import ApiError
from rapshee_engine.server.fields import (
    UNSUPPORTED,
    NumCompletions,
    Penalty,
    Positive,
    Probability,
    StreamOptions,
    Temperature,
    UnknownFieldLog,
    check_shared,
    decode_body,
    includes_usage,
    shared_sampling_options,
    unknown_names,
    unsupported,
)

__all__ = ["ChatRequest", "parse_chat_request"]

# Documented by OpenAI and not there yet. JSON null is their absence.
_REFUSED = (
    "audio",
    "function_call",
    "functions",
    "moderation",
    "prediction",
    "reasoning_effort",
    "tool_choice",
    "tools",
    "verbosity",
    "web_search_options",
)
_REFUSED_IN_MESSAGE = ("audio", "function_call", "name", "refusal", "tool_call_id", "tool_calls")

_ROLES = ("system", "developer", "user", "assistant")


class ContentPart(Struct):
    """A part of a message's content; only text parts are served."""

    type: str
    text: str | None = None


class Message(Struct):
    """One message as it comes in."""

    role: str
    content: str | list[ContentPart] | None = None
    name: Any = None
    audio: Any = None
    refusal: Any = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None


class ResponseFormat(Struct):
    type: str


class ChatRequest(Struct):
    """Body of ``POST /v1/chat/completions``: every field that OpenAI documents."""

    model: str
    messages: list[Message]

    temperature: Temperature | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: NumCompletions | None = None
    stop: str | list[str] | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # One value of these asks for what is done anyway; the others are refused.
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    service_tier: str | None = None
    store: bool | None = None

    # These cannot change the answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    moderation: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @property
    def completion_limit(self) -> int | None:
        """Most tokens to generate; None: up to the end of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_completions(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return includes_usage(self)

    def template_messages(self) -> list[dict[str, str]]:
        """The conversation as chat templates know it: roles ``system``, ``user``, ``assistant``
        (``developer`` is the newer name of ``system``), content one string."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": _text(message.content),
            }
            for message in self.messages
        ]

    def sampling_params(self) -> SamplingParams:
        """The request's options for the engine.

        Raises:
            InvalidRequestError: a value that only the engine's own bounds exclude.
        """
        return SamplingParams(
            n=self.num_completions,
            max_tokens=self.completion_limit,
            **shared_sampling_options(self),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY,
        )


def parse_chat_request(body: bytes, unknown_fields: UnknownFieldLog) -> ChatRequest:
    """The request in a JSON body.

    Raises:
        ApiError: 400 naming the field at fault.
    """
    request = decode_body(body, ChatRequest, _unknown_fields, unknown_fields)
    _check(request)
    return request


def _unknown_fields(body: bytes) -> Iterator[str]:
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    yield from unknown_names(fields, ChatRequest)
    messages = msgspec.json.decode(fields["messages"], type=list[dict[str, msgspec.Raw]])
    for message in messages:
        for name in message.keys() - Message.__struct_fields__:
            yield f"messages.{name}"


def _check(request: ChatRequest) -> None:
    _check_refused(request, _REFUSED, "")
    _check_single_values(request)
    check_shared(request)
    _check_options(request)
    if not request.messages:
        raise ApiError.invalid("'messages' must hold at least one message", "messages")
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages.{index}")


def _check_refused(owner: Struct, names: tuple[str, ...], prefix: str) -> None:
    for name in names:
        if getattr(owner, name) is not None:
            raise unsupported(f"{prefix}{name}")


def _check_single_values(request: ChatRequest) -> None:
    """Fields of which one value asks for what is done anyway."""
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported("response_format", "only {'type': 'text'} is")
    if request.modalities is not None and request.modalities != ["text"]:
        raise unsupported("modalities", "only ['text'] is")
    if request.service_tier not in (None, "auto", "default"):
        raise unsupported("service_tier", "only 'auto' and 'default' are")
    if request.store:
        raise unsupported("store", "nothing is stored, so only false is")


def _check_options(request: ChatRequest) -> None:
    """Fields that depend on one another."""
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError.invalid("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError.invalid(
            "'max_tokens' and 'max_completion_tokens' are two names of one limit and differ: "
            f"{request.max_tokens} and {request.max_completion_tokens}",
            "max_tokens",
        )


def _check_message(message: Message, path: str) -> None:
    if message.role not in _ROLES:
        raise ApiError.invalid(
            f"Invalid '{path}.role': expected one of {', '.join(_ROLES)}, "
            f"got {message.role[:64]!r}",
            f"{path}.role",
        )
    _check_refused(message, _REFUSED_IN_MESSAGE, f"{path}.")
    if message.content is None or message.content == []:
        raise ApiError.invalid(
            f"'{path}.content' must be a string or a list of text parts", f"{path}.content"
        )
    if not isinstance(message.content, str):
        for index, part in enumerate(message.content):
            _check_part(part, f"{path}.content.{index}")


def _check_part(part: ContentPart, path: str) -> None:
    if part.type != "text":
        raise ApiError.invalid(
            f"Invalid '{path}.type': only text parts are supported, got {part.type[:64]!r}",
            f"{path}.type",
            UNSUPPORTED,
        )
    if part.text is None:
        raise ApiError.invalid(f"Missing required parameter: '{path}.text'", f"{path}.text")


def _text(content: str | list[ContentPart] | None) -> str:
    """Content as one string. Parts are joined by a line break, as other engines do for templates
    that know only strings."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text or "" for part in content)
