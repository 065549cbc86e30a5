"""Chat messages to token ids, by the checkpoint's Jinja template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import Template, TemplateSyntaxError, nodes

from rapshee_engine.errors import (
    InvalidRequestError,
    RapsheeError,
    UnsupportedModelError,
    WeightFileError,
)
from rapshee_engine.tokenizer.bounds import MAX_OUTPUT_BYTES, RenderBudget
from rapshee_engine.tokenizer.control_tokens import ControlTokens
from rapshee_engine.tokenizer.jinja_sandbox import ChatEnvironment
from rapshee_engine.tokenizer.text_is_data import TextGuard, encode_marked
from rapshee_engine.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "check_template_size"]

# Characters; the longest of known models have 20,000. Compiling takes up to 20 us a character.
_MAX_SOURCE = 1 << 16


def check_template_size(source: str | None, file: str) -> str | None:
    """``source``, which comes from ``file``; raises `WeightFileError` if it is far too long."""
    if source is not None and len(source) > _MAX_SOURCE:
        raise WeightFileError(
            file, f"its chat template has {len(source)} characters (at most {_MAX_SOURCE})"
        )
    return source


class ChatTemplate:
    """A compiled chat template. Immutable, and safe to use from several threads."""

    def __init__(
        self, source: str, *, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        """Compile ``source``, in which the two strings are variables.

        Raises:
            UnsupportedModelError: the template is broken, or needs what the sandbox lacks.
        """
        environment = ChatEnvironment()
        try:
            with RenderBudget():  # constant expressions are evaluated here
                self._constants = _constants(environment.parse(source))
                self._template: Template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise UnsupportedModelError(
                f"chat template, line {error.lineno}: {error.message}"
            ) from None
        except Exception as error:  # evaluating a constant expression may raise anything
            raise UnsupportedModelError(f"chat template: {error}") from None
        self._source = source
        variables = {"bos_token": bos_token, "eos_token": eos_token}
        self._variables = {name: value for name, value in variables.items() if value is not None}
        self._guards: WeakKeyDictionary[ControlTokens, TextGuard] = WeakKeyDictionary()

    def render_ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of the messages as the model wants them.

        Control tokens come from the template alone: their strings inside the messages are plain
        text.

        Args:
            add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            InvalidRequestError: the template refuses the messages, or they are no JSON values;
                ``param`` is ``messages`` or the path of the value.
            UnsupportedModelError: a control token of the vocabulary cannot be kept out of text.
        """
        _check_form(messages)
        marked, marker = self._guard(tokenizer.control).mark(messages, self._source)
        try:
            with RenderBudget():
                rendered = self._render(marked, add_generation_prompt)
        except RapsheeError:
            raise
        except Exception as error:  # templates raise whatever their expressions raise
            reason = str(error).replace(marker, "") or type(error).__name__
            raise InvalidRequestError(f"chat template: {reason}", param="messages") from None
        return encode_marked(tokenizer, rendered, marker)

    def _guard(self, control: ControlTokens) -> TextGuard:
        guard = self._guards.get(control)
        if guard is None:
            guard = self._guards[control] = TextGuard(control, self._constants)
        return guard

    def _render(self, messages: Sequence[Any], add_generation_prompt: bool) -> str:
        chunks = []
        size = 0
        for chunk in self._template.generate(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        ):
            size += len(chunk.encode("utf-8", "surrogatepass"))
            if size > MAX_OUTPUT_BYTES:
                raise InvalidRequestError(
                    f"the rendered chat is longer than {MAX_OUTPUT_BYTES} bytes", param="messages"
                )
            chunks.append(chunk)
        return "".join(chunks)


def _check_form(messages: object) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InvalidRequestError("messages must be a list of messages", param="messages")
    if not messages:
        raise InvalidRequestError("messages must not be empty", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequestError(
                f"a message must map strings to values, got {type(message).__name__}",
                param=f"messages.{index}",
            )


def _constants(template: nodes.Template) -> Iterable[str]:
    """Strings that the template may look for in the messages: constants and attribute names."""
    constants = {node.value for node in template.find_all(nodes.Const)}
    names = {node.attr for node in template.find_all(nodes.Getattr)}
    return {text for text in constants | names if isinstance(text, str) and text}
