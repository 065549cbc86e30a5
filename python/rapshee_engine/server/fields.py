"""What the bodies of several endpoints have in common: fields, their bounds, their errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from msgspec import Meta, Struct

from rapshee_engine.server.errors import ApiError

__all__ = [
    "UNSUPPORTED",
    "NumCompletions",
    "Penalty",
    "Positive",
    "Probability",
    "SharedFields",
    "StreamOptions",
    "Temperature",
    "UnknownFieldLog",
    "check_shared",
    "decode_body",
    "includes_usage",
    "shared_sampling_options",
    "unknown_names",
    "unsupported",
]

logger = logging.getLogger(__name__)

UNSUPPORTED = "unsupported_parameter"

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
NumCompletions = Annotated[int, Meta(ge=1, le=128)]

T = TypeVar("T", bound=Struct)


class StreamOptions(Struct):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SharedFields(Protocol):
    """Fields that every endpoint which generates has, under OpenAI's names."""

    temperature: float | None
    top_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: dict[str, float] | None
    seed: int | None
    stop: str | list[str] | None
    stream: bool | None
    stream_options: StreamOptions | None


# Decoding


def decode_body(
    body: bytes,
    kind: type[T],
    unknown_fields: Callable[[bytes], Iterable[str]],
    log: UnknownFieldLog,
) -> T:
    """The ``kind`` of request in a JSON body; the names that ``unknown_fields`` finds in it are
    noted in ``log``.

    Raises:
        ApiError: 400 naming the field at fault.
    """
    try:
        # Decoded as text first: msgspec skips unknown fields without looking at their bytes.
        request = msgspec.json.decode(body.decode("utf-8"), type=kind)
        log.note(unknown_fields(body))
    except UnicodeDecodeError:
        raise ApiError.invalid("The request body is not valid UTF-8", None) from None
    except RecursionError:
        raise ApiError.invalid("The request body is nested too deeply", None) from None
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except msgspec.DecodeError as error:
        raise ApiError.invalid(f"The request body is not valid JSON: {error}", None) from None
    return request


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


class UnknownFieldLog:
    """Logs each field name that is in no API once, up to a bound. Owned by the event loop."""

    def __init__(self, *, most: int = 100) -> None:
        self._most = most
        self._seen: set[str] = set()

    def note(self, names: Iterable[str]) -> None:
        for name in names:
            # Cut: what is remembered and logged is the client's text.
            name = name[:64]
            if name not in self._seen and len(self._seen) < self._most:
                self._seen.add(name)
                logger.warning("ignored the unknown request field %r", name)


def unknown_names(fields: Mapping[str, msgspec.Raw], kind: type[Struct]) -> Iterator[str]:
    """Names in a body, and in its ``stream_options``, that ``kind`` does not know."""
    yield from fields.keys() - kind.__struct_fields__
    if "stream_options" in fields:
        options = msgspec.json.decode(fields["stream_options"], type=dict[str, msgspec.Raw] | None)
        for name in (options or {}).keys() - StreamOptions.__struct_fields__:
            yield f"stream_options.{name}"


# Checks


def unsupported(param: str, hint: str = "") -> ApiError:
    """A 400 for a field, or a value of it, that is documented but not there."""
    detail = f" ({hint})" if hint else ""
    return ApiError.invalid(f"'{param}' is not supported{detail}", param, UNSUPPORTED)


def check_shared(request: SharedFields) -> None:
    """What types and bounds do not say about the shared fields.

    Raises:
        ApiError: 400 naming the field at fault.
    """
    if request.stream_options is not None:
        if not request.stream:
            raise ApiError.invalid("'stream_options' needs 'stream': true", "stream_options")
        if request.stream_options.include_obfuscation:
            raise unsupported("stream_options.include_obfuscation", "only false is")
    if request.stop is not None:
        _check_stop([request.stop] if isinstance(request.stop, str) else request.stop)
    if request.logit_bias is not None:
        _check_logit_bias(request.logit_bias)


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


# For the engine


def includes_usage(request: SharedFields) -> bool:
    """Whether the stream ends with a chunk of usage."""
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def shared_sampling_options(request: SharedFields) -> dict[str, Any]:
    """The shared fields as keyword arguments of `SamplingParams`."""
    top_p = 1.0 if request.top_p is None else request.top_p
    one_token = top_p < _NUCLEUS_OF_ONE
    return {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if one_token else top_p,
        "top_k": 1 if one_token else 0,
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "logit_bias": {int(token): bias for token, bias in (request.logit_bias or {}).items()},
        "seed": request.seed,
        "stop": () if request.stop is None else request.stop,
    }
