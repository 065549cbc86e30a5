"""Writes ``tokenizers/``, small vocabularies, and ``tokenizer_strings.json``: what `transformers`
makes of ten thousand texts with each of them, and with the vocabulary of a llama GGUF file.

Run from the root of the repository, after ``pip install '.[oracle]'``:

    PYTHONPATH=tests python -m golden.make_tokenizer_strings SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from golden.make_chat_templates import CORPUS
from golden.make_smollm2 import build_tokenizer
from rapshee_engine.weights.gguf import read_gguf
from reference.golden import GOLDEN_FOLDER
from reference.tokenizer_strings import digests, tokenizer_strings

# A tiny map of characters, in place of the 240 kB of NFKC.
CHARSMAP = {
    "ﬁ": "fi",
    "½": "1/2",
    "\u00a0": " ",
    "\u3000": " ",
    "e\u0301": "é",
    "\t": " ",
    "Ⅷ": "VIII",
}

COMMON: dict[str, Any] = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
GEMMA: dict[str, Any] = {
    **COMMON,
    "add_dummy_prefix": False,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "bos_piece": "<bos>",
    "eos_piece": "<eos>",
    "control_symbols": ["<start_of_turn>", "<end_of_turn>"],
    "user_defined_symbols": [
        *("<mask>", "<table>", "[multimodal]"),
        *("\n" * size for size in range(1, 5)),
        *("▁" * size for size in range(2, 6)),
    ],
}


def added(content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    names = ("lstrip", "normalized", "rstrip", "single_word")
    return {"content": content, "special": special} | {n: flags.get(n, False) for n in names}


# Name of each folder -> options of the training, tokenizer_config.json, added_tokens.json.
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (
        COMMON,
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "added_tokens_decoder": {
                "0": added("<unk>", special=True),
                "1": added("<s>", special=True),
                "2": added("</s>", special=True),
                "420": added("<|left|>", special=True, lstrip=True),
                "421": added("<|right|>", special=True, rstrip=True),
                "422": added("<both>", lstrip=True, rstrip=True),
                "423": added("word", single_word=True),
                "424": added("<normal>", normalized=True),
                "425": added("<normal><x>", normalized=True),
            },
        },
        {},
    ),
    # Every piece of text between added tokens has a space of its own.
    "legacy": (
        COMMON,
        {
            "add_bos_token": True,
            "add_eos_token": True,
            "pad_token": "<pad>",
            "added_tokens_decoder": {
                "420": added("<pad>", special=True),
                "421": added("<tool>"),
            },
        },
        {"<pad>": 420, "<tool>": 421},
    ),
    "gemma": (GEMMA, {"add_bos_token": True, "add_eos_token": False}, {}),
    "unigram": (
        {**COMMON, "model_type": "unigram", "remove_extra_whitespaces": True},
        {"add_bos_token": False, "add_eos_token": True},
        {},
    ),
    # Characters outside the vocabulary are one unknown token a run.
    "unknown": (
        {**COMMON, "byte_fallback": False, "character_coverage": 0.98},
        {"add_bos_token": True, "add_eos_token": False},
        {},
    ),
}


def train(folder: Path, options: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    options = {"character_coverage": 1.0, **options}
    if options["remove_extra_whitespaces"]:
        rules = folder / "rules.tsv"
        rules.write_text("".join(f"{_hex(k)}\t{_hex(v)}\n" for k, v in CHARSMAP.items()))
        options["normalization_rule_tsv"] = str(rules)
        del options["normalization_rule_name"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "rules.tsv").unlink(missing_ok=True)


def _hex(text: str) -> str:
    return " ".join(f"{ord(char):X}" for char in text)


def write_folder(name: str) -> Path:
    options, settings, added_tokens = FOLDERS[name]
    folder = GOLDEN_FOLDER / "tokenizers" / name
    shutil.rmtree(folder, ignore_errors=True)
    train(folder, options)
    settings = {**settings, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    if added_tokens:
        (folder / "added_tokens.json").write_text(json.dumps(added_tokens, indent=1) + "\n")
    return folder


def slow_ids(folder: Path, fast: Any, texts: list[str]) -> list[list[int]]:
    """Ids of the slow tokenizer, which asks the `sentencepiece` library.

    The fast one differs from that library in corners: the text ``<0x0A>`` becomes a byte, and ``▁``
    is no space where extra spaces are dropped.
    """
    slow = SentencePieceBackend(
        vocab_file=str(folder / "tokenizer.model"),
        extra_special_tokens=sorted(fast.get_added_vocab()),
        **{name: str(getattr(fast, name)) for name in ("bos_token", "eos_token", "unk_token")},
    )
    first, last = fast.encode("a")[0], fast.encode("a")[-1]
    before = [first] if first == fast.bos_token_id else []
    behind = [last] if last == fast.eos_token_id else []
    return [[*before, *slow.encode(t, add_special_tokens=False), *behind] for t in texts]


def record(fast: Any, specials: list[str], ids: Iterable[list[int]]) -> dict[str, Any]:
    each, whole = digests((i, fast.decode(i, skip_special_tokens=False)) for i in ids)
    return {
        "specials": specials,
        "each": base64.b64encode(each.tobytes()).decode(),
        "whole": whole,
    }


def main(gguf: Path) -> None:
    folders = {name: write_folder(name) for name in FOLDERS}
    chat_folder = GOLDEN_FOLDER / "chat_tokenizers"
    folders |= {name: chat_folder / name for name in ("byte_level", "byte_fallback")}
    fasts = {n: transformers.AutoTokenizer.from_pretrained(f) for n, f in folders.items()}
    fasts["smollm2"] = build_tokenizer(read_gguf(gguf).metadata)
    kinds = {}
    for name, fast in fasts.items():
        specials = sorted(fast.get_added_vocab())
        texts = tokenizer_strings(specials)
        if name in ("gemma", "unigram"):
            ids = slow_ids(folders[name], fast, texts)
        else:
            ids = [fast.encode(text) for text in texts]
        kinds[name] = record(fast, specials, ids)
    golden = {"transformers": transformers.__version__, "kinds": kinds}
    (GOLDEN_FOLDER / "tokenizer_strings.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
