"""The chat-completion request: its fields, their bounds, and what is refused by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.server.errors import ApiError

__all__ = ["ChatRequest", "UnknownFieldLog", "parse_chat_request"]

logger = logging.getLogger(__name__)

UNSUPPORTED = "unsupported_parameter"

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
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_MAX_STOP = 4
_MAX_BIAS = 100.0

# The likeliest of V tokens has a probability of at least 1 / V, and no vocabulary has this many
# tokens: a nucleus this small is the likeliest token alone, top_p = 0 included.
_NUCLEUS_OF_ONE = 1e-9

Temperature = Annotated[float, Meta(ge=0, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Positive = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]


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


class StreamOptions(Struct):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


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
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
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
        return self.stream_options is not None and bool(self.stream_options.include_usage)

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
        top_p = 1.0 if self.top_p is None else self.top_p
        one_token = top_p < _NUCLEUS_OF_ONE
        return SamplingParams(
            n=self.num_completions,
            max_tokens=self.completion_limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if one_token else top_p,
            top_k=1 if one_token else 0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=self.seed,
            stop=() if self.stop is None else self.stop,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY,
        )


def parse_chat_request(body: bytes, unknown_fields: UnknownFieldLog) -> ChatRequest:
    """The request in a JSON body.

    Raises:
        ApiError: 400 naming the field at fault.
    """
    try:
        # Decoded as text first: msgspec skips unknown fields without looking at their bytes.
        request = msgspec.json.decode(body.decode("utf-8"), type=ChatRequest)
        unknown_fields.note(body)
    except UnicodeDecodeError:
        raise ApiError.invalid("The request body is not valid UTF-8", None) from None
    except RecursionError:
        raise ApiError.invalid("The request body is nested too deeply", None) from None
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except msgspec.DecodeError as error:
        raise ApiError.invalid(f"The request body is not valid JSON: {error}", None) from None
    _check(request)
    return request


class UnknownFieldLog:
    """Logs each field name that is in no API once, up to a bound. Owned by the event loop."""

    def __init__(self, *, most: int = 100) -> None:
        self._most = most
        self._seen: set[str] = set()

    def note(self, body: bytes) -> None:
        """Look at a body that decodes as a `ChatRequest`."""
        for name in _unknown_fields(body):
            # Cut: what is remembered and logged is the client's text.
            name = name[:64]
            if name not in self._seen and len(self._seen) < self._most:
                self._seen.add(name)
                logger.warning("ignored the unknown request field %r", name)


def _unknown_fields(body: bytes) -> Iterator[str]:
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    yield from fields.keys() - ChatRequest.__struct_fields__
    messages = msgspec.json.decode(fields["messages"], type=list[dict[str, msgspec.Raw]])
    for message in messages:
        for name in message.keys() - Message.__struct_fields__:
            yield f"messages.{name}"
    if "stream_options" in fields:
        options = msgspec.json.decode(fields["stream_options"], type=dict[str, msgspec.Raw] | None)
        for name in (options or {}).keys() - StreamOptions.__struct_fields__:
            yield f"stream_options.{name}"


def _field_error(reason: str) -> ApiError:
    """msgspec's message, whose end says where, as an error that names the field."""
    what, _, where = reason.partition(" - at `$")
    param = where.rstrip("`").replace("[...]", "").replace("[", ".").replace("]", "").lstrip(".")
    missing = re.search(r"missing required field `(\w+)`", what)
    if missing:
        name = f"{param}.{missing[1]}".lstrip(".")
        return ApiError.invalid(f"Missing required parameter: '{name}'", name)
    if not param:
        return ApiError.invalid(f"Invalid request body: {what}", None)
    return ApiError.invalid(f"Invalid '{param}': {what}", param)


def _check(request: ChatRequest) -> None:
    _check_refused(request, _REFUSED, "")
    _check_single_values(request)
    _check_options(request)
    if request.logit_bias is not None:
        _check_logit_bias(request.logit_bias)
    if not request.messages:
        raise ApiError.invalid("'messages' must hold at least one message", "messages")
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages.{index}")


def _check_refused(owner: Struct, names: tuple[str, ...], prefix: str) -> None:
    for name in names:
        if getattr(owner, name) is not None:
            raise _unsupported(f"{prefix}{name}")


def _check_single_values(request: ChatRequest) -> None:
    """Fields of which one value asks for what is done anyway."""
    if request.response_format is not None and request.response_format.type != "text":
        raise _unsupported("response_format", "only {'type': 'text'} is")
    if request.modalities is not None and request.modalities != ["text"]:
        raise _unsupported("modalities", "only ['text'] is")
    if request.service_tier not in (None, "auto", "default"):
        raise _unsupported("service_tier", "only 'auto' and 'default' are")
    if request.store:
        raise _unsupported("store", "nothing is stored, so only false is")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        raise _unsupported("stream_options.include_obfuscation", "only false is")


def _check_options(request: ChatRequest) -> None:
    """Fields that depend on one another, and lists whose length is bounded."""
    if request.stream_options is not None and not request.stream:
        raise ApiError.invalid("'stream_options' needs 'stream': true", "stream_options")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError.invalid("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError.invalid(
            "'max_tokens' and 'max_completion_tokens' are two names of one limit and differ: "
            f"{request.max_tokens} and {request.max_completion_tokens}",
            "max_tokens",
        )
    if request.stop is not None:
        _check_stop([request.stop] if isinstance(request.stop, str) else request.stop)


def _check_stop(strings: list[str]) -> None:
    if not 1 <= len(strings) <= _MAX_STOP or not all(strings):
        raise ApiError.invalid(f"'stop' must be 1 to {_MAX_STOP} strings, none empty", "stop")


def _check_logit_bias(biases: Mapping[str, float]) -> None:
    for token, bias in biases.items():
        if not _TOKEN_ID.fullmatch(token):
            raise ApiError.invalid(
                f"'logit_bias' maps token ids such as \"50\" to numbers, got {token[:64]!r}",
                "logit_bias",
            )
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise ApiError.invalid(
                f"Invalid 'logit_bias.{token}': expected a number from -100 to 100, got {bias}",
                f"logit_bias.{token}",
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


def _unsupported(param: str, hint: str = "") -> ApiError:
    detail = f" ({hint})" if hint else ""
    return ApiError.invalid(f"'{param}' is not supported{detail}", param, UNSUPPORTED)
