"""How a byte-level BPE vocabulary cuts text into words, by the name a GGUF file gives it.

Names, expressions and flags are those of llama.cpp (``src/llama-vocab.cpp``, ``llm_tokenizer_bpe``
and ``llama_vocab::impl::load``). Where the original ``tokenizer.json`` composes the same rule from
other parts, its composition is used, and named.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from rapshee_engine.errors import UnsupportedModelError

__all__ = ["PreTokenizer", "pre_tokenizer"]


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One rule.

    Attributes:
        splits: expressions applied one after the other; each match becomes a piece of its own.
        digits: first, every digit becomes a piece of its own.
        nfc: text is brought to Unicode's composed form first.
        ignore_merges: a word that is a token as a whole is that token, whatever the merges say.
        add_bos: a text starts with the beginning-of-sequence token unless the file says otherwise.
    """

    splits: tuple[str, ...]
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def rule(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.extend(pre_tokenizers.Split(Regex(split), "isolated") for split in self.splits)
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


# GPT-2's words: English contractions, letters, digits and signs, each with the space before it.
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _tiktoken_words(digits: str) -> str:
    """cl100k's words, with ``digits`` as the rule for numbers."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"))
_GPT2 = PreTokenizer((_GPT2_WORDS,))
# tokenizer.json of SmolLM and StarCoder: Digits(individual), then GPT-2's words.
_DIGITS_GPT2 = PreTokenizer((_GPT2_WORDS,), digits=True)
# tokenizer.json of Meta-Llama-3-8B: Split, ByteLevel(use_regex=false); model.ignore_merges.
_LLAMA3 = PreTokenizer((_tiktoken_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
# transformers, models/qwen2/tokenization_qwen2.py: NFC, Split, ByteLevel(use_regex=false).
_QWEN2 = PreTokenizer((_tiktoken_words(r"\p{N}"),), nfc=True)
# llama.cpp quotes this expression of Mistral Nemo beside its own rewriting of it; transformers,
# integrations/mistral/tokenizer.py, sets ignore_merges.
_TEKKEN = PreTokenizer(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    ignore_merges=True,
    add_bos=True,
)

_BY_NAME = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _DIGITS_GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
}


def pre_tokenizer(name: str, source: str) -> PreTokenizer:
    """The rule called ``name`` (``tokenizer.ggml.pre``).

    Raises:
        UnsupportedModelError: an unknown name.
    """
    if name not in _BY_NAME:
        raise UnsupportedModelError(
            f"{source}: pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; "
            f"supported: {', '.join(sorted(_BY_NAME))}"
        )
    return _BY_NAME[name]
