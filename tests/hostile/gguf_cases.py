"""GGUF files: headers, hyper-parameters, tensors, vocabularies."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from hostile.case import Case, Gguf, gguf_case
from rapshee_engine.errors import UnsupportedModelError
from reference.gguf_writer import TYPE_IDS

__all__ = ["gguf_cases"]

U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = 4, 5, 6, 7, 8, 9, 10, 11, 12
HUGE = (1 << 64) - 1
EDGES = {"2^64-1": HUGE, "2^63": 1 << 63, "2^63-1": (1 << 63) - 1, "2^61": 1 << 61}


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    """Type and value of a metadata array, whose count may lie."""
    return struct.pack("<IIQ", ARRAY, kind, count) + data


def set_key(key: str, value: Any) -> Any:
    return lambda g: g.set(key, value)


def raw_key(key: str, value: bytes) -> Any:
    return lambda g: g.set_raw(key, value)


def assign(**fields: Any) -> Any:
    return lambda g: vars(g).update(fields)


def record(index: int, **fields: Any) -> Any:
    return lambda g: g.change(index, **fields)


def cut_after(part: str) -> Any:
    """The file ends behind a part."""

    def cut(g: Gguf) -> bytes:
        data = b""
        for name, piece in g.pieces():
            data += piece
            if name == part:
                break
        return data

    return cut


def whole_file() -> list[Case]:
    return [
        gguf_case("empty", lambda _: b""),
        gguf_case("other magic", assign(magic=b"GGML")),
        gguf_case("version 0", assign(version=0)),
        gguf_case("version 1", assign(version=1)),
        gguf_case("big-endian", assign(version=3 << 24)),
        gguf_case("version 2^32-1", assign(version=(1 << 32) - 1)),
        gguf_case("text after the magic", lambda _: b"GGUF" + b"A" * 4096),
        gguf_case("zeros after the magic", lambda _: b"GGUF\3\0\0\0" + bytes(1 << 16)),
        *(
            gguf_case(f"{count} tensors", assign(num_tensors=n))
            for count, n in {**EDGES, "2^15+1": (1 << 15) + 1, "12": 12, "10": 10}.items()
        ),
        *(
            gguf_case(f"{count} keys", assign(num_keys=n))
            for count, n in {**EDGES, "2^14+1": (1 << 14) + 1, "20": 20, "18": 18}.items()
        ),
        gguf_case("no tensors and no keys", assign(records=[], keys=[])),
    ]


def truncated() -> Iterator[Case]:
    """One case for each kind of boundary; what lies between keys is alike."""
    ends = ("length", "key", "type", "value")
    for part, _ in Gguf().pieces():
        key = part.rpartition(" of ")[2] if part.startswith(ends) else part
        if part.startswith(ends) and key != "tokenizer.ggml.merges":
            continue
        if part.startswith(("name", "record")) and "token_embd" not in part:
            continue
        if part != "data":
            yield gguf_case(f"ends after {part}", cut_after(part))
    for place, missing in (("one byte", 1), ("half", 40_000), ("all but a byte", 10)):
        yield gguf_case(f"ends {place} early", lambda g, n=missing: g.build()[:-n])


def metadata() -> Iterator[Case]:
    key, text = "general.name", partial(struct.pack, "<IQ")
    name = struct.pack("<Q", 12) + b"general.name"

    def first_key(data: bytes) -> Any:
        """Bytes in the place of the first key."""

        def build(g: Gguf) -> bytes:
            parts = g.pieces()
            return b"".join(p for _, p in parts[:4]) + data + b"".join(p for _, p in parts[8:])

        return build

    for label, n in EDGES.items():
        yield gguf_case(
            f"string of {label} bytes", raw_key(key, text(STRING, n)), set_key(key, "name")
        )
        yield gguf_case(f"key of {label} bytes", first_key(struct.pack("<Q", n)))
        for kind in (0, STRING, U64, ARRAY):
            yield gguf_case(f"array of {label} items of type {kind}", raw_key(key, array(kind, n)))
    values = {
        "text that is not UTF-8": text(STRING, 1) + b"\xff",
        "half a character": text(STRING, 2) + b"\xe2\x96",
        "a surrogate": text(STRING, 3) + b"\xed\xa0\x80",
        "a bool of 2": struct.pack("<IB", BOOL, 2),
        "type 13": struct.pack("<IQ", 13, 0),
        "type 2^32-1": struct.pack("<IQ", (1 << 32) - 1, 0),
        "array of type 13": array(13, 1),
        "array of bools of 3": array(BOOL, 2, b"\1\3"),
        "arrays nested 5 deep": struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5,
        "arrays nested 10,000 deep": struct.pack("<I", ARRAY)
        + struct.pack("<IQ", ARRAY, 1) * 10**4,
        "2^20 arrays of 2^20 arrays": array(ARRAY, 1 << 20, struct.pack("<IQ", ARRAY, 1 << 20)),
        "2^23 strings that are not there": array(STRING, 1 << 23),
        "2^23 numbers that are not there": array(F64, 1 << 23),
    }
    for label, value in values.items():
        yield gguf_case(label, raw_key(key, value))
    yield gguf_case("an empty key", first_key(struct.pack("<QIB", 0, BOOL, 1)))
    yield gguf_case("a key of 2^16 bytes", first_key(struct.pack("<Q", 1 << 16) + b"k" * (1 << 16)))
    yield gguf_case("a key that is not UTF-8", first_key(struct.pack("<Q", 1) + b"\xff" + bytes(8)))
    twice = name + text(STRING, 1) + b"x"
    yield gguf_case("a key twice", first_key(twice * 2))
    for value in (0, 1, 4, 24, (1 << 32) - 1, 1 << 31, "32", True, 32.0, [32], math.nan):
        yield gguf_case(
            f"alignment {value!r}",
            lambda g, v=value: (
                g.number("general.alignment", U32, "<I", v)
                if type(v) is int
                else g.set("general.alignment", v)
            ),
            set_key("general.alignment", 32),
        )


def hyper_parameters() -> Iterator[Case]:
    sizes = (
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "context_length",
        "attention.head_count",
        "attention.head_count_kv",
        "rope.dimension_count",
        "attention.key_length",
    )
    for key in sizes:
        full = f"llama.{key}"
        yield gguf_case(f"{key} 0", set_key(full, 0))
        yield gguf_case(f"{key} -1", lambda g, k=full: g.number(k, I32, "<i", -1))
        yield gguf_case(f"{key} 2^32-1", lambda g, k=full: g.number(k, U32, "<I", (1 << 32) - 1))
        yield gguf_case(f"{key} 2^64-1", lambda g, k=full: g.number(k, U64, "<Q", HUGE))
        yield gguf_case(f"{key} NaN", set_key(full, math.nan))
        yield gguf_case(f"{key} a string", set_key(full, "32"))
        yield gguf_case(f"{key} true", set_key(full, True))
        yield gguf_case(f"{key} a list", set_key(full, [32] * 100_000))
    for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base"):
        for value in (0.0, -1.0, math.nan, math.inf, -math.inf, 1e-40, "x", [1.0]):
            yield gguf_case(f"{key} {value!r}", set_key(f"llama.{key}", value))
        yield gguf_case(f"{key} 1e308", lambda g, k=key: g.number(f"llama.{k}", F64, "<d", 1e308))
    for key in sizes[:5]:
        yield gguf_case(f"no {key}", set_key(f"llama.{key}", None))
    yield gguf_case("3 heads of a width of 32", set_key("llama.attention.head_count", 3))
    yield gguf_case("3 key-value heads of 2", set_key("llama.attention.head_count_kv", 3))
    yield gguf_case("7 rotated dimensions", set_key("llama.rope.dimension_count", 7))
    yield gguf_case("18 rotated dimensions of 16", set_key("llama.rope.dimension_count", 18))
    yield gguf_case("heads of 15", set_key("llama.attention.key_length", 15))
    yield gguf_case("4096 layers", set_key("llama.block_count", 4096))
    yield gguf_case("a vocabulary of 2^24", set_key("llama.vocab_size", 1 << 24))
    unsupported = {
        "an unknown architecture": ("general.architecture", "rm -rf"),
        "unknown scaling": ("llama.rope.scaling.type", "spiral"),
        "an unknown key": ("llama.attention.secret", 1),
        "experts": ("llama.expert_count", 8),
        "a split file": ("split.count", 2),
        "a split file, by a string": ("split.count", "1"),
    }
    for label, (key, value) in unsupported.items():
        yield gguf_case(label, set_key(key, value), error=UnsupportedModelError)
    yield gguf_case("no architecture", set_key("general.architecture", None))
    yield gguf_case("a number for the architecture", set_key("general.architecture", 1))
    yield gguf_case("a list of architectures", set_key("general.architecture", ["llama"] * 1000))
    yield gguf_case("scaling by 0", scaled(0.0), scaled(2.0))


def scaled(factor: float) -> Any:
    def change(g: Gguf) -> None:
        g.set("llama.rope.scaling.type", "linear")
        g.set("llama.rope.scaling.factor", factor)

    return change


def tensors() -> Iterator[Case]:
    shapes: dict[str, tuple[int, ...]] = {
        "no dimensions": (),
        "5 dimensions": (32, 510, 1, 1, 1),
        "a dimension of 0": (32, 0),
        "a dimension of 2^64-1": (32, HUGE),
        "2^64 elements": (1 << 32, 1 << 32),
        "a product that wraps to what is there": (32, 510 + (1 << 59)),
        "2^252 elements": (1 << 63,) * 4,
        "one row more": (32, 511),
        "rows one longer": (33, 510),
        "one dimension": (32 * 510,),
    }
    for label, dims in shapes.items():
        yield gguf_case(f"tensor of {label}", record(0, dims=dims))
    for kind in (4, 5, 9, 31, 36, 200, (1 << 32) - 1, TYPE_IDS["q8_0"]):
        yield gguf_case(f"tensor of type {kind}", record(0, kind=kind))
    offsets = {
        "2^64-1": HUGE,
        "2^64-32": HUGE - 31,
        "2^63": 1 << 63,
        "2^63-32": (1 << 63) - 32,
        "1": 1,
        "16": 16,
        "beyond the end": 1 << 20,
        "of the tensor before": 0,
    }
    for label, offset in offsets.items():
        yield gguf_case(f"tensor at offset {label}", record(5, offset=offset))
    yield gguf_case("last tensor beyond the end", record(10, offset=1 << 16))
    yield gguf_case("a tensor twice", lambda g: g.records.append(g.records[3]))
    yield gguf_case("a hole between tensors", hole)
    yield gguf_case("a tensor without a name", record(3, name=""))
    yield gguf_case("a tensor name of 2^16 bytes", record(3, name="n" * (1 << 16)))
    yield gguf_case("a missing tensor", record(3, name="blk.0.attn_q.weigh"))
    yield gguf_case("an unknown tensor", extra("blk.0.attn_q.lora"), error=UnsupportedModelError)
    yield gguf_case(
        "a tensor of another layer", extra("blk.1.attn_q.weight"), error=UnsupportedModelError
    )
    yield gguf_case(
        "30,000 tensors that are not there",
        lambda g: g.records.extend(
            type(g.records[0])(f"t{i}", (1,), 0, (1 << 20) + 32 * i) for i in range(30_000)
        ),
    )
    for label, factors in {
        "NaN": [math.nan] * 8,
        "infinite": [math.inf] * 8,
        "0": [0.0] * 8,
        "negative": [-1.0] * 8,
        "too few": [1.0] * 7,
        "too many": [1.0] * 4096,
        "two-dimensional": [[1.0] * 8],
    }.items():
        yield gguf_case(
            f"rotary factors: {label}",
            lambda g, f=factors: g.add("rope_freqs.weight", np.array(f, np.float32)),
            lambda g: g.add("rope_freqs.weight", np.ones(8, np.float32)),
        )


def hole(g: Gguf) -> None:
    """A gap of 64 bytes, in which something could hide."""
    at = g.records[-1].offset
    g.data = g.data[:at] + bytes(64) + g.data[at:]
    g.change(len(g.records) - 1, offset=at + 64)


def extra(name: str) -> Any:
    return lambda g: g.add(name, np.ones((2, 2), np.float32))


def vocabulary() -> Iterator[Case]:
    prefix = "tokenizer.ggml."
    known = [f"<{i}>" for i in range(510)]

    def tokenizer(label: str, key: str, value: Any, twin: Any = None, **fields: Any) -> Case:
        right = None if twin is None else set_key(prefix + key, twin)
        fields.setdefault("stage", "tokenizer")
        return gguf_case(f"tokenizer: {label}", set_key(prefix + key, value), right, **fields)

    tokens = Gguf()
    own = next(v for k, v in tokens.keys if k == b"tokenizer.ggml.tokens")
    yield tokenizer("one token too few", "tokens", known[1:], stage="checkpoint")
    yield tokenizer("one token too many", "tokens", [*known, "x"], stage="checkpoint")
    yield tokenizer("numbers for tokens", "tokens", [1] * 510)
    yield tokenizer("a string for tokens", "tokens", "x" * 510)
    yield tokenizer("a token twice", "tokens", [*known[1:], known[1]])
    yield tokenizer("no tokens", "tokens", None)
    yield gguf_case(
        "tokenizer: a token that is not UTF-8",
        raw_key(prefix + "tokens", own[:24] + b"\xff" + own[25:]),
    )
    yield tokenizer("one type too few", "token_type", [1] * 509)
    yield tokenizer("strings for types", "token_type", ["3"] * 510)
    yield tokenizer("a string of types", "token_type", "1" * 510)
    yield tokenizer("floats for types", "token_type", [3.0] * 510)
    yield tokenizer("a merge of unknown tokens", "merges", ["nosuch token"])
    yield tokenizer("a merge into an unknown token", "merges", ["t h", "z z"])
    yield tokenizer("a merge of one token", "merges", ["ab"])
    yield tokenizer("a merge of nothing", "merges", [" "])
    yield tokenizer("a merge of 10^6 spaces", "merges", [" " * 10**6])
    yield tokenizer("numbers for merges", "merges", [1, 2])
    yield tokenizer("no merges", "merges", None)
    for key in ("eos_token_id", "eot_token_id"):
        for value in (510, "2", 1.0, True, [510]):
            yield tokenizer(f"{key} {value!r}", key, value, twin=3, stage="checkpoint")
    for key in ("bos_token_id", "eom_token_id"):
        for value in (510, "2", 1.0, True, [1]):
            yield tokenizer(f"{key} {value!r}", key, value, twin=3)
    yield gguf_case(
        "tokenizer: bos_token_id 2^32-1",
        lambda g: g.number(prefix + "bos_token_id", U32, "<I", (1 << 32) - 1),
        stage="tokenizer",
    )
    yield tokenizer("a string for a switch", "add_bos_token", "false", twin=False)
    yield tokenizer("a number for a switch", "add_eos_token", 2, twin=True)
    yield tokenizer("an unknown kind", "model", "llamas", error=UnsupportedModelError)
    yield tokenizer("a list for the kind", "model", ["gpt2"] * 10**5, error=UnsupportedModelError)
    yield tokenizer("an unknown rule", "pre", "(a+)+$", error=UnsupportedModelError)
    yield tokenizer("a list for the rule", "pre", ["gpt-2"] * 10**5)
    for value in (1, ["{{ messages }}"] * 1000):
        yield gguf_case(
            f"tokenizer: {type(value).__name__} for the template",
            set_key("tokenizer.chat_template", value),
            stage="tokenizer",
        )


def gguf_cases() -> list[Case]:
    parts = (whole_file, truncated, metadata, hyper_parameters, tensors, vocabulary)
    return [case for part in parts for case in part()]
