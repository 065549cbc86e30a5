from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models

from rapshee_engine.engine.outputs import Logprob
from rapshee_engine.server.legacy_logprobs import LegacyLogprobs, TextPositions, token_string
from rapshee_engine.tokenizer.tokenizer import Tokenizer
from rapshee_engine.tokenizer.vocabulary import LibraryVocabulary
from reference.fake_runner import EOS, make_tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """A vocabulary as sentencepiece conversions have it; a text loses its first space."""
    tokens = ["▁The", "▁caf", "<0xC3>", "<0xA9>", "▁a", "!"]
    hf = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    )
    hf.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    hf.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(LibraryVocabulary(hf, "test"))


def walk(positions: TextPositions, token_ids: list[int]) -> tuple[list[int], str]:
    pushed = [positions.push(token_id) for token_id in token_ids]
    return [offset for offset, _ in pushed], "".join(t for _, t in pushed) + positions.finish()


def test_positions_of_bytes_of_a_character_are_the_character_s() -> None:
    tokenizer = make_tokenizer()
    token_ids = tokenizer.encode("aé€b")
    assert len(token_ids) == 7
    assert walk(TextPositions(tokenizer), token_ids) == ([0, 1, 1, 2, 2, 2, 3], "aé€b")


def test_positions_begin_where_the_text_does() -> None:
    tokenizer = make_tokenizer()
    assert walk(TextPositions(tokenizer, start=10), tokenizer.encode("ab")) == ([10, 11], "ab")


def test_positions_around_held_back_bytes_and_a_dropped_space() -> None:
    positions = TextPositions(byte_fallback_tokenizer())
    assert walk(positions, [0, 1, 2, 3, 4, 5]) == ([0, 3, 7, 7, 8, 10], "The café a!")


def test_positions_of_tokens_that_follow_a_text_keep_its_space() -> None:
    tokenizer = byte_fallback_tokenizer()
    assert walk(TextPositions(tokenizer, start=4, after=[0]), [1, 5]) == ([4, 8], " caf!")


def test_a_character_that_never_ends_has_a_place() -> None:
    assert walk(TextPositions(byte_fallback_tokenizer()), [0, 2]) == ([0, 3], "The\ufffd")


def test_control_tokens_take_room_only_where_they_are_shown() -> None:
    tokenizer = make_tokenizer()
    token_ids = [*tokenizer.encode("a"), EOS, *tokenizer.encode("b")]
    assert walk(TextPositions(tokenizer), token_ids) == ([0, 1, 1], "ab")
    shown = TextPositions(tokenizer, show_control=True)
    assert walk(shown, token_ids) == ([0, 1, 8], "a<|end|>b")


def test_ids_without_a_token_take_no_room() -> None:
    assert walk(TextPositions(make_tokenizer()), [10_000]) == ([0], "")


def test_tokens_are_text_or_bytes() -> None:
    assert token_string("é".encode()) == "é"
    assert token_string(b"\xe2\x80") == "bytes:\\xe2\\x80"


def test_the_token_is_among_the_likeliest_and_the_best_come_first() -> None:
    logprobs = LegacyLogprobs()
    chosen = Logprob(float("-inf"), 9, "c", b"c")
    logprobs.add({3: chosen, 1: Logprob(-0.5, 1, "a", b"a"), 2: Logprob(-1.0, 2, "b", b"b")}, 4)
    assert logprobs.token_logprobs == [-9999.0]
    assert [list((top or {}).items()) for top in logprobs.top_logprobs] == [
        [("a", -0.5), ("b", -1.0), ("c", -9999.0)]
    ]
    assert (logprobs.tokens, logprobs.text_offset) == (["c"], [4])


def test_of_tokens_with_one_text_the_likelier_counts() -> None:
    logprobs = LegacyLogprobs()
    logprobs.add({3: Logprob(-2.0, 2, "a", b"a"), 1: Logprob(-0.5, 1, "a", b"a")}, 0)
    assert logprobs.top_logprobs == [{"a": -0.5}]
    assert logprobs.token_logprobs == [-2.0]
