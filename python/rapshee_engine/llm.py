"""The synchronous embedded API."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.engine import Engine, RequestFailure
from rapshee_engine.engine.input_processor import Prompt
from rapshee_engine.engine.output_processor import RequestGroup
from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.errors import EngineClosedError, InvalidRequestError
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.tokenizer.tokenizer import Tokenizer

__all__ = ["LLM"]

Message = Mapping[str, Any]

_LONGEST_WAIT_S = 0.25


class LLM:
    """A model in this process.

    ::

        with LLM(model="model.gguf") as llm:
            for output in llm.generate(["Hello", "The capital of France is"]):
                print(output.outputs[0].text)

    One thread at a time may use it; `AsyncEngine` serves many. A forked child has to make its own.
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Load the model. ``options`` are those of `EngineConfig`.

        Raises:
            ConfigError, WeightFileError, UnsupportedModelError: the model cannot be loaded so.
        """
        self._start(Engine.from_config(EngineConfig(model=model, **options)))

    @classmethod
    def from_engine(cls, engine: Engine) -> LLM:
        """Use an engine that is made already, and own it from now on."""
        self = cls.__new__(cls)
        self._start(engine)
        return self

    def _start(self, engine: Engine) -> None:
        self._engine = engine
        self._owner = os.getpid()
        self._request_ids = itertools.count()
        self._is_closed = False
        # The steps run on a thread of their own: Ctrl-C reaches the main thread between any two
        # bytecodes, and must not tear a step apart.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="rapshee-engine")

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete the prompts; outputs in their order.

        Args:
            prompts: text, ``{"prompt": text}``, ``{"prompt_token_ids": ids}``, or a list of these.
                Completions go on with that text.
            sampling_params: one for all, or one for each prompt.
            use_tqdm: show a progress bar.

        Raises:
            InvalidRequestError: a prompt or its options cannot be served; nothing was generated.
            StepError: a step failed; all requests of this call were ended.
            EngineClosedError, EngineDeadError: no step can run any more.
        """
        if self._is_closed:
            raise EngineClosedError("the engine is closed")
        batch = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        groups = [
            self._process(prompt, params)
            for prompt, params in zip(batch, _per_prompt(sampling_params, len(batch)), strict=True)
        ]
        return self._run(groups, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of conversations, by the model's chat template.
        Arguments and errors as in `generate`."""
        if not messages:
            raise InvalidRequestError("messages must not be empty", param="messages")
        is_one = isinstance(messages, Mapping) or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_one else messages
        prompts: list[Prompt] = [
            {"prompt_token_ids": self._engine.render_chat(conversation), "is_chat": True}
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        self._is_closed = True
        self._executor.shutdown()
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _process(self, prompt: Prompt, params: SamplingParams) -> RequestGroup:
        return self._engine.input_processor.process(
            str(next(self._request_ids)),
            prompt,
            replace(params, output_kind=RequestOutputKind.FINAL_ONLY),
        )

    def _run(self, groups: list[RequestGroup], use_tqdm: bool) -> list[RequestOutput]:
        if os.getpid() != self._owner:
            raise EngineClosedError("threads do not survive a fork; make an LLM in this process")
        interrupted = threading.Event()
        try:
            running = self._executor.submit(
                _run_to_end, self._engine, groups, use_tqdm, interrupted
            )
            # A signal that comes just before a wait does not end it: so no wait is long.
            while not wait([running], timeout=_LONGEST_WAIT_S).done:
                pass
            return running.result()
        except KeyboardInterrupt:  # wherever it hit: the call may not even have begun
            interrupted.set()
            self._executor.submit(_nothing).result()  # runs when the requests are aborted
            raise


def _nothing() -> None:
    pass


def _per_prompt(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if sampling_params is None:
        return [SamplingParams()] * count
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * count
    if len(sampling_params) != count:
        raise InvalidRequestError(
            f"{count} prompts, but {len(sampling_params)} sampling_params; give one for all or one "
            "for each"
        )
    return sampling_params


def _run_to_end(
    engine: Engine, groups: list[RequestGroup], use_tqdm: bool, interrupted: threading.Event
) -> list[RequestOutput]:
    """Step until all requests have ended. A failure or an interruption ends them all."""
    outputs: dict[str, RequestOutput] = {}
    failure: RequestFailure | None = None
    with tqdm(total=len(groups), desc="Generating", disable=not use_tqdm) as progress:
        for group in groups:
            engine.add(group)
        while engine.has_unfinished:
            for event in engine.step():
                if isinstance(event, RequestFailure):
                    failure = failure or event
                else:
                    outputs[event.request_id] = event
                    progress.update()
            if failure is not None or interrupted.is_set():
                for group in groups:
                    engine.abort(group.request_id)
    if failure is not None:
        raise failure.error
    return [outputs[group.request_id] for group in groups]
