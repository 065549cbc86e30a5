"""Exceptions that users of the package can catch. All derive from `RapsheeError`."""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "ContextLengthError",
    "DownloadError",
    "EngineClosedError",
    "EngineDeadError",
    "InvalidRequestError",
    "RapsheeError",
    "StepError",
    "UnsupportedModelError",
    "WeightFileError",
]


class RapsheeError(Exception):
    """Base of all errors that the package raises on purpose."""


class ConfigError(RapsheeError, ValueError):
    """An engine or server option is wrong; the message says what to change."""


class InvalidRequestError(RapsheeError, ValueError):
    """A request cannot be served as asked. Over HTTP: 400.

    Attributes:
        param: dotted path of the offending field, as in the API (``messages.0.role``), or None.
        code: the API's error code, or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(InvalidRequestError):
    """Prompt, or prompt plus completion, does not fit the context (``context_length_exceeded``)."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")

    @classmethod
    def check(
        cls, num_prompt_tokens: int, max_tokens: int | None, max_model_len: int, *, param: str
    ) -> None:
        """Raise it if the prompt, which came in the field ``param``, leaves no room for a token, or
        not the room that was asked for."""
        if num_prompt_tokens + (1 if max_tokens is None else max_tokens) <= max_model_len:
            return
        asked = num_prompt_tokens + (max_tokens or 0)
        split = f"{num_prompt_tokens} in the {param}"
        if max_tokens is not None:
            split += f", {max_tokens} in the completion"
        raise cls(
            f"This model's maximum context length is {max_model_len} tokens. However, you "
            f"requested {asked} tokens ({split}). Please reduce the length of the {param} or "
            "completion.",
            param=param,
        )


class WeightFileError(RapsheeError):
    """A weight file is broken or incomplete.

    Attributes:
        file: path of the file.
        tensor: name of the tensor as in the file, or None where the header is at fault.
        reason: what is wrong.
    """

    def __init__(self, file: str, reason: str, *, tensor: str | None = None) -> None:
        where = f"{file}: tensor {tensor!r:.200}" if tensor is not None else file
        super().__init__(f"{where}: {reason}")
        self.file = file
        self.tensor = tensor
        self.reason = reason


class UnsupportedModelError(RapsheeError):
    """The checkpoint needs something that this engine does not implement; the message names it."""


class DownloadError(RapsheeError):
    """A model could not be fetched or did not pass its checksum."""


class StepError(RapsheeError):
    """An exception inside a step failed the requests that were in it. Over HTTP: 500."""


class EngineDeadError(RapsheeError):
    """The device or the step loop failed for good; the engine has to be created again."""


class EngineClosedError(RapsheeError):
    """The engine was closed."""
