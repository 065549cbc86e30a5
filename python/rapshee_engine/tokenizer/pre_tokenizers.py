"""How a byte-level BPE vocabulary cuts text into words, by the name a GGUF file gives it.

Names, expressions and flags are those of llama.cpp (``src/llama-vocab.cpp``, ``llm_tokenizer_bpe``
and ``llama_vocab::impl::load``). Where the original ``tokenizer.json`` composes the same rule from
other parts, its composition is used, and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from tokenizers import Regex, normalizers, pre_tokenizers

from rapshee_engine.errors import UnsupportedModelError
from rapshee_engine.files import short_repr

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "pre_tokenizer"]


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One rule.

    Attributes:
        splits: expressions applied one after the other; each match becomes a piece of its own.
        digits: first, every digit becomes a piece of its own.
        byte_splits: like ``splits``, but applied to the characters that stand for bytes.
        nfc: text is brought to Unicode's composed form first.
        ignore_merges: a word that is a token as a whole is that token, whatever the merges say.
        add_bos: a text starts with the beginning-of-sequence token unless the file says otherwise.
    """

    splits: tuple[str, ...]
    digits: bool = False
    byte_splits: tuple[str, ...] = ()
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def rule(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.extend(pre_tokenizers.Split(Regex(split), "isolated") for split in self.splits)
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        steps.extend(pre_tokenizers.Split(Regex(s), "isolated") for s in self.byte_splits)
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


# GPT-2's words: English contractions, letters, digits and signs, each with the space before it.
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE_RUNS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    """The words of tiktoken's cl100k, with ``digits`` as the rule for numbers."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACE_RUNS}"
    )


def _o200k(digits: str, contractions: str = "") -> str:
    """The words of tiktoken's o200k, which begin anew where a small letter meets a capital."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return (
        f"{lead}{upper}*{lower}+{contractions}|{lead}{upper}+{lower}*{contractions}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACE_RUNS}"
    )


_MAYBE = f"{_CONTRACTIONS}?"  # behind a word
_THREE_DIGITS = r"\p{N}{1,3}"
_CJK_WORDS = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"

# tokenizer.json of DeepSeek-V3: Split for each of the three, ByteLevel(use_regex=false).
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+"
)
_DEEPSEEK3 = PreTokenizer((_THREE_DIGITS, _CJK_WORDS, rf"{_DEEPSEEK3_WORDS}[\r\n]*{_SPACE_RUNS}"))
# The letters of DeepSeek-LLM's tokenizer.json: Latin, Greek, Cyrillic and others that have case.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-"
    "\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-"
    "\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-"
    "\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-"
    "\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_SIGNS = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"

# Words of Bloom: no white space, and none of the signs after which a sentence or clause ends.
_BLOOM_WORDS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_JAIS2_SPACES = "|".join(rf"\s{{{size}}}(?!\S)" for size in (512, 256, 128, 64, 32, 16, 8, 4))

_GPT2 = PreTokenizer((_GPT2_WORDS,))
# tokenizer.json of SmolLM and StarCoder: Digits(individual), then GPT-2's words.
_DIGITS_GPT2 = PreTokenizer((_GPT2_WORDS,), digits=True)
_CL100K = PreTokenizer((_cl100k(_THREE_DIGITS),))
# tokenizer.json of Meta-Llama-3-8B: Split, ByteLevel(use_regex=false); model.ignore_merges.
_LLAMA3 = replace(_CL100K, ignore_merges=True, add_bos=True)
# transformers, models/qwen2/tokenization_qwen2.py: NFC, Split, ByteLevel(use_regex=false).
_QWEN2 = PreTokenizer((_cl100k(r"\p{N}"),), nfc=True)
_QWEN2_WORDS = replace(_QWEN2, nfc=False)
# llama.cpp quotes this expression of Mistral Nemo beside its own rewriting of it; transformers,
# integrations/mistral/tokenizer.py, sets ignore_merges.
_TEKKEN = PreTokenizer((_o200k(r"\p{N}"),), ignore_merges=True, add_bos=True)
_GPT4O = PreTokenizer((_o200k(_THREE_DIGITS, _MAYBE),))
_BLOOM = PreTokenizer((_BLOOM_WORDS,))

_RULES = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
    # tokenizer.json of Falcon: Punctuation(contiguous), ByteLevel, Digits(contiguous), Split; the
    # last two see bytes, some of which are shown as superscripts and fractions.
    "falcon": PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2_WORDS), byte_splits=(r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
    # tokenizer.json of GPT-NeoX-20B, which both use: NFC, GPT-2's words.
    "mpt olmo": replace(_GPT2, nfc=True),
    "gpt-2 phi-2 jais trillion granite-docling gigachat a.x-4.0 mellum exaone4": _GPT2,
    "smollm starcoder refact codeshell exaone minerva-7b mellum2": _DIGITS_GPT2,
    # tokenizer.json of Command-R: NFC, Digits(individual), GPT-2's words.
    "command-r": replace(_DIGITS_GPT2, nfc=True),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": _LLAMA3,
    "dbrx smaug-bpe chatglm-bpe": _CL100K,
    "glm4 glm5": replace(_CL100K, ignore_merges=True),
    "minicpm5": PreTokenizer((_THREE_DIGITS, _cl100k(r"\p{N}+")), ignore_merges=True),
    # transformers' Qwen and Stability AI's Arcade100k, which is made from it, compose to NFC.
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2": _QWEN2,
    "hunyuan solar-open grok-2": _QWEN2_WORDS,
    "qwen35": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACE_RUNS}",
        ),
        nfc=True,
    ),
    "seed-coder": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+{_SPACE_RUNS}",
        )
    ),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "exaone-moe": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "jais-2": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_THREE_DIGITS}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_JAIS2_SPACES}|\s{{1,2}}(?!\S)|\s{{1}}",
        )
    ),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _cl100k(r"\p{N}"))),
    "tekken": _TEKKEN,
    "gpt-4o llama4 kanana2 talkie minimax-m2": _GPT4O,
    "youtu": PreTokenizer(
        (
            "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b"
            "\uff0c\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _CJK_WORDS,
            _o200k(r"\p{N}", _MAYBE),
        ),
        ignore_merges=True,
    ),
    # Its vocabulary has no number of two digits, so that it does not matter how they are cut.
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            rf"\s?{_DEEPSEEK_SIGNS}",
            r"\s+$",
            _DEEPSEEK_CJK,
            r"\p{N}",
        )
    ),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")
    ),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _DEEPSEEK3,
    "spark2_5": PreTokenizer(
        (
            _THREE_DIGITS,
            _CJK_WORDS,
            rf"{_DEEPSEEK3_WORDS}|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ),
    "bloom gpt3-finnish poro-chat": _BLOOM,
    "viking": replace(_BLOOM, splits=(_BLOOM_WORDS, r"\p{N}")),
}
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {name: rule for names, rule in _RULES.items() for name in names.split()}
)


def pre_tokenizer(name: str, source: str) -> PreTokenizer:
    """The rule called ``name`` (``tokenizer.ggml.pre``).

    Raises:
        UnsupportedModelError: an unknown name.
    """
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{source}: pre-tokenizer {short_repr(name)} (tokenizer.ggml.pre) is not supported; "
            f"supported: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]
