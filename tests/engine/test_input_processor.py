from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models

from rapshee_engine.engine.input_processor import InputProcessor
from rapshee_engine.engine.output_processor import RequestGroup
from rapshee_engine.errors import ContextLengthError, InvalidRequestError
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.tokenizer.tokenizer import Tokenizer
from rapshee_engine.tokenizer.vocabulary import LibraryVocabulary
from reference.fake_runner import EOS, make_tokenizer

TOKENIZER = make_tokenizer()


def process(
    prompt: Any,
    *,
    kv_cache_tokens: int = 1000,
    tokenizer: Tokenizer = TOKENIZER,
    **options: Any,
) -> RequestGroup:
    processor = InputProcessor(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        max_model_len=32,
        kv_cache_tokens=kv_cache_tokens,
        eos_token_ids=frozenset({EOS}),
    )
    return processor.process("r", prompt, SamplingParams(**options))


def byte_fallback_tokenizer() -> Tokenizer:
    """A vocabulary of which a text loses its first space."""
    hf = tokenizers.Tokenizer(models.BPE(vocab={"▁a": 0, "▁b": 1}, merges=[]))
    hf.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(LibraryVocabulary(hf, "test"))


@pytest.mark.parametrize(
    ("extra", "text"), [({}, " b"), ({"is_chat": False}, " b"), ({"is_chat": True}, "b")]
)
def test_a_completion_goes_on_and_an_answer_begins(extra: dict[str, bool], text: str) -> None:
    prompt = {"prompt_token_ids": [0], **extra}
    (completion,) = process(prompt, tokenizer=byte_fallback_tokenizer()).completions
    completion.append(1, None)
    assert completion.output(RequestOutputKind.CUMULATIVE).text == text


def test_text_is_tokenised() -> None:
    group = process("hello")
    assert group.prompt == "hello"
    assert group.prompt_token_ids == TOKENIZER.encode("hello")
    assert process({"prompt": "hello"}).prompt_token_ids == group.prompt_token_ids


def test_control_tokens_in_raw_text_are_control_tokens() -> None:
    assert process("a<|end|>").prompt_token_ids[-1] == EOS


@pytest.mark.parametrize("ids", [[1, 2], (1, 2)])
def test_token_ids_are_taken_as_they_are(ids: Any) -> None:
    group = process({"prompt_token_ids": ids})
    assert (group.prompt, group.prompt_token_ids) == (None, [1, 2])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "must not be empty"),
        ({"prompt_token_ids": []}, "must not be empty"),
        ({"prompt_token_ids": [1, -1]}, "token id -1 is outside"),
        ({"prompt_token_ids": [1, 258]}, "token id 258 is outside"),
        ({"prompt_token_ids": [1 << 64]}, "outside the vocabulary"),
        ({"prompt_token_ids": [1.0]}, "list of integers"),
        ({"prompt_token_ids": [True]}, "list of integers"),
        ({"prompt_token_ids": "12"}, "list of integers"),
        ({"prompt_token_ids": None}, "list of integers"),
        ({"prompt": 5}, "a string or "),
        ({"prompt": "a", "prompt_token_ids": [1]}, "exactly one"),
        ({}, "exactly one"),
        ({"text": "a"}, "exactly one"),
        ({"is_chat": True}, "exactly one"),
        ({"prompt": "a", "is_chat": 1}, "is_chat must be"),
        (5, "a string or "),
        ([1, 2], "a string or "),
        ("a\ud800", "surrogate"),
    ],
)
def test_a_bad_prompt_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        process(prompt)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop_token_ids", [258]),
        ("allowed_token_ids", [3, 258]),
        ("logit_bias", {258: 1.0}),
        ("stop", ["\ud800"]),
    ],
)
def test_options_are_held_against_the_vocabulary(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        process("a", **{name: value})
    assert caught.value.param == name


def test_min_tokens_must_leave_something_to_draw() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        process("a", allowed_token_ids=[EOS, 5], stop_token_ids=[5], min_tokens=1)
    process("a", allowed_token_ids=[EOS, 5], min_tokens=1)


@pytest.mark.parametrize(
    ("length", "max_tokens"), [(31, 1), (16, 16), (1, 31), (31, None), (1, None), (32, 0)]
)
def test_what_fits_the_context_is_taken(length: int, max_tokens: int | None) -> None:
    group = process("a" * length, max_tokens=max_tokens)
    expected = 32 - length if max_tokens is None else max_tokens
    assert group.completions[0].request.max_tokens == expected


@pytest.mark.parametrize(
    ("length", "max_tokens", "asked"),
    [(32, 1, 33), (16, 17, 33), (32, None, 32), (40, None, 40), (33, 0, 33)],
)
def test_what_does_not_fit_the_context_is_refused(
    length: int, max_tokens: int | None, asked: int
) -> None:
    with pytest.raises(ContextLengthError) as caught:
        process("a" * length, max_tokens=max_tokens)
    message = str(caught.value)
    assert "maximum context length is 32 tokens" in message
    assert f"requested {asked} tokens ({length} in the prompt" in message
    assert (f"{max_tokens} in the completion" in message) == (max_tokens is not None)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"


def test_what_can_never_fit_the_cache_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="kv_cache_memory_bytes"):
        process("a" * 10, max_tokens=11, kv_cache_tokens=20)
    with pytest.raises(InvalidRequestError, match="kv_cache_memory_bytes"):
        process("a" * 20, max_tokens=None, kv_cache_tokens=20)
    group = process("a" * 10, max_tokens=None, kv_cache_tokens=20)
    assert group.completions[0].request.max_tokens == 10
    with pytest.raises(InvalidRequestError, match="kv_cache_memory_bytes"):
        process("a" * 21, max_tokens=0, kv_cache_tokens=20)
    process("a" * 20, max_tokens=0, kv_cache_tokens=20)


def test_completions_are_sequences_that_follow_the_first() -> None:
    requests = [c.request for c in process("a", n=3, seed=-1).completions]
    assert [r.seed for r in requests] == [(1 << 64) - 1, 0, 1]
    assert [r.leader for r in requests] == [None, requests[0], requests[0]]
    assert len({r.request_id for r in requests}) == 3


def test_stop_tokens_include_end_of_sequence_unless_ignored() -> None:
    def stops(**options: Any) -> frozenset[int]:
        return process("a", stop_token_ids=[7], **options).completions[0].request.stop_token_ids

    assert stops() == {7, EOS}
    assert stops(ignore_eos=True) == {7}


def test_without_a_vocabulary_ids_are_all_that_is_taken() -> None:
    processor = InputProcessor(
        tokenizer=Tokenizer.without_vocabulary(),
        vocab_size=10,
        max_model_len=32,
        kv_cache_tokens=1000,
        eos_token_ids=frozenset(),
    )
    ids = {"prompt_token_ids": [1, 9]}
    assert processor.process("r", ids, SamplingParams()).prompt_token_ids == [1, 9]
    for prompt, params, param in (
        ("text", SamplingParams(), "prompt"),
        (ids, SamplingParams(stop=["x"]), "stop"),
    ):
        with pytest.raises(InvalidRequestError, match="loaded without a tokenizer") as caught:
            processor.process("r", prompt, params)
        assert caught.value.param == param
