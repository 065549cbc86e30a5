"""From what a caller asks to sequences that the scheduler can take."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rapshee_engine.engine.output_processor import Completion, RequestGroup
from rapshee_engine.engine.request import Request
from rapshee_engine.errors import ContextLengthError, InvalidRequestError
from rapshee_engine.sampling_params import SamplingParams
from rapshee_engine.tokenizer.detokenizer import Detokenizer
from rapshee_engine.tokenizer.tokenizer import Tokenizer, reject_lone_surrogates

__all__ = ["InputProcessor", "Prompt"]

Prompt = str | Mapping[str, Any]
"""Text, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``: the completion goes on with that
text. With ``"is_chat": True`` beside them it is a text of its own, an answer."""


@dataclass(frozen=True, slots=True)
class InputProcessor:
    """Tokenises and checks requests. Holds no state: any thread may call it.

    Attributes:
        max_model_len: context length in tokens.
        kv_cache_tokens: tokens of the longest sequence that the KV cache can serve.
        eos_token_ids: tokens that end a completion unless ``ignore_eos``.
    """

    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    kv_cache_tokens: int
    eos_token_ids: frozenset[int]

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams,
        *,
        cache_salt: str = "",
    ) -> RequestGroup:
        """The request, ready for ``Engine.add``.

        Raises:
            ContextLengthError: prompt, or prompt and completion, do not fit the context.
            InvalidRequestError: anything else that cannot be served as asked.
        """
        text, token_ids = self._token_ids(prompt)
        is_chat = isinstance(prompt, Mapping) and prompt.get("is_chat", False)
        after = () if is_chat else token_ids
        self._check_vocabulary(token_ids, sampling_params)
        max_tokens = self._max_tokens(len(token_ids), sampling_params.max_tokens)
        requests = self._requests(request_id, token_ids, sampling_params, max_tokens, cache_salt)
        return RequestGroup(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            sampling_params=sampling_params,
            completions=[
                Completion(index, request, self._detokenizer(sampling_params, after))
                for index, request in enumerate(requests)
            ],
            arrival_time=time.monotonic(),
            prompt_logprobs=None if sampling_params.prompt_logprobs is None else [None],
        )

    # Prompt

    def _token_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "is_chat"}
            if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
                raise InvalidRequestError(
                    "a prompt must have exactly one of the keys 'prompt' and 'prompt_token_ids', "
                    f"got {sorted(map(str, prompt))}",
                    param="prompt",
                )
            if not isinstance(prompt.get("is_chat", False), bool):
                raise InvalidRequestError(
                    f"is_chat must be True or False, got {prompt['is_chat']!r}", param="is_chat"
                )
            if "prompt_token_ids" in prompt:
                return None, self._checked_ids(prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        if not isinstance(prompt, str):
            raise InvalidRequestError(
                "a prompt must be a string or {'prompt_token_ids': [int, ...]}, got "
                f"{type(prompt).__name__}",
                param="prompt",
            )
        reject_lone_surrogates(prompt, "prompt")
        token_ids = self.tokenizer.encode(prompt)
        if not token_ids:
            raise InvalidRequestError("the prompt must not be empty", param="prompt")
        return prompt, token_ids

    def _checked_ids(self, token_ids: object) -> list[int]:
        if not isinstance(token_ids, Sequence) or isinstance(token_ids, (str, bytes)):
            raise InvalidRequestError(
                f"prompt_token_ids must be a list of integers, got {type(token_ids).__name__}",
                param="prompt_token_ids",
            )
        if not token_ids:
            raise InvalidRequestError("the prompt must not be empty", param="prompt_token_ids")
        if not all(type(token_id) is int for token_id in token_ids):
            raise InvalidRequestError(
                "prompt_token_ids must be a list of integers", param="prompt_token_ids"
            )
        return list(token_ids)

    def _check_vocabulary(self, token_ids: list[int], params: SamplingParams) -> None:
        for name, ids in (
            ("prompt_token_ids", token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias),
        ):
            if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
                raise InvalidRequestError(
                    f"{name}: token id {wrong} is outside the vocabulary (0 to "
                    f"{self.vocab_size - 1})",
                    param=name,
                )
        if params.stop:
            self.tokenizer.require_vocabulary("stop strings", "stop")
        for stop in params.stop:
            reject_lone_surrogates(stop, "stop")
        allowed = params.allowed_token_ids
        ends = {*params.stop_token_ids, *self.eos_token_ids}
        if allowed is not None and params.min_tokens and ends.issuperset(allowed):
            raise InvalidRequestError(
                "with min_tokens, allowed_token_ids must hold a token that does not end the text",
                param="allowed_token_ids",
            )

    # Limits

    def _max_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        ContextLengthError.check(num_prompt_tokens, max_tokens, self.max_model_len, param="prompt")
        limit = min(self.max_model_len, self.kv_cache_tokens)
        room = 1 if max_tokens is None else max_tokens
        if num_prompt_tokens + room > limit:
            raise InvalidRequestError(
                f"the request needs {num_prompt_tokens} tokens for the prompt and {room} for the "
                f"completion, but the KV cache holds {limit}; ask for less, or start the engine "
                "with a larger kv_cache_memory_bytes"
            )
        return limit - num_prompt_tokens if max_tokens is None else max_tokens

    # Sequences

    def _requests(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        max_tokens: int,
        cache_salt: str,
    ) -> list[Request]:
        seed = secrets.randbits(63) if params.seed is None else params.seed
        stop_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_token_ids |= self.eos_token_ids
        # The prompt is scored once; the other completions find its blocks in the prefix cache.
        unscored = replace(params, prompt_logprobs=None)
        requests: list[Request] = []
        for index in range(params.n):
            request = Request(
                f"{request_id}/{index}",
                token_ids,
                params if index == 0 else unscored,
                max_tokens=max_tokens,
                seed=(seed + index) % (1 << 64),
                stop_token_ids=stop_token_ids,
                cache_salt=cache_salt,
                leader=requests[0] if requests else None,
            )
            requests.append(request)
        return requests

    def _detokenizer(self, params: SamplingParams, after: Sequence[int]) -> Detokenizer:
        return Detokenizer(
            self.tokenizer,
            stop=tuple(params.stop),
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            after=after,
        )
