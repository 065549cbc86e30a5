from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fuzz.mutations import mutations
from fuzz.targets import fuzz_gguf
from hostile.case import Gguf
from rapshee_engine.errors import WeightFileError
from rapshee_engine.weights.gguf import GGUFFile, read_gguf
from rapshee_engine.weights.tensor_info import TensorInfo
from reference.gguf_writer import TYPE_IDS, TensorRecord, build_gguf, string, write_gguf
from reference.quant import DTYPES

F32 = TYPE_IDS["f32"]


def read(tmp_path: Path, data: bytes) -> GGUFFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return read_gguf(path)


def value(kind: int, data: bytes) -> bytes:
    """One metadata entry with key ``key``."""
    return string("key") + struct.pack("<I", kind) + data


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def small_file() -> bytes:
    """A well-formed file that uses every part of the format."""
    metadata = {
        "general.architecture": "llama",
        "a.number": 7,
        "a.float": 0.5,
        "a.flag": True,
        "tokens": ["a", "ü", ""],
        "scores": [0.5, -1.0],
        "types": [1, -1],
    }
    tensors = [TensorRecord("one", (4, 2), F32, 0), TensorRecord("two", (3,), F32, 32)]
    return build_gguf(metadata, tensors, bytes(range(44)))


def test_reads_metadata_and_tensors(tmp_path: Path) -> None:
    data = small_file()
    header = read(tmp_path, data)
    assert header.metadata == {
        "general.architecture": "llama",
        "a.number": 7,
        "a.float": 0.5,
        "a.flag": True,
        "tokens": ["a", "ü", ""],
        "scores": [0.5, -1.0],
        "types": [1, -1],
    }
    start = len(data) - 44
    assert header.tensors == {
        "one": TensorInfo("one", "f32", (2, 4), start, 32),
        "two": TensorInfo("two", "f32", (3,), start + 32, 12),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_each_tensor_type(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {}, {"w": (dtype, np.ones((3, 512), dtype=np.float32))})
    info = read_gguf(path).tensors["w"]
    assert (info.dtype, info.shape) == (dtype, (3, 512))
    assert info.offset + info.nbytes == path.stat().st_size


@pytest.mark.parametrize(
    ("kind", "layout", "number"),
    [
        (0, "<B", 200),
        (1, "<b", -100),
        (2, "<H", 60000),
        (3, "<h", -30000),
        (4, "<I", 4_000_000_000),
        (5, "<i", -2_000_000_000),
        (6, "<f", 1.5),
        (10, "<Q", 1 << 63),
        (11, "<q", -(1 << 63)),
        (12, "<d", 0.1),
    ],
)
def test_reads_each_number_type(tmp_path: Path, kind: int, layout: str, number: float) -> None:
    packed = struct.pack(layout, number)
    scalar = build_gguf(value(kind, packed), num_keys=1)
    assert read(tmp_path, scalar).metadata == {"key": number}
    twice = build_gguf(value(9, array(kind, 2, packed * 2)), num_keys=1)
    assert read(tmp_path, twice).metadata == {"key": [number, number]}


def test_reads_nested_arrays(tmp_path: Path) -> None:
    inner = array(4, 2, struct.pack("<II", 1, 2))
    data = build_gguf(value(9, array(9, 2, inner + array(8, 0))), num_keys=1)
    assert read(tmp_path, data).metadata == {"key": [[1, 2], []]}


def test_items_of_all_arrays_are_bounded_together(tmp_path: Path) -> None:
    half = struct.pack("<I", 9) + array(0, 3 << 20, bytes(3 << 20))
    keys = b"".join(string(f"key{i}") + half for i in range(2))
    with pytest.raises(WeightFileError, match="key1: array of 3145728 items"):
        read(tmp_path, build_gguf(keys, num_keys=2))


def test_alignment_of_the_metadata_is_used(tmp_path: Path) -> None:
    metadata = {"general.alignment": 256}
    data = build_gguf(metadata, [TensorRecord("w", (2,), F32, 0)], bytes(8), alignment=256)
    assert read(tmp_path, data).tensors["w"].offset == 256


def test_header_larger_than_the_first_read(tmp_path: Path) -> None:
    token = "x" * 1024
    metadata = {"tokens": [token] * (17 << 10), "last": 1}
    header = read(tmp_path, build_gguf(metadata))
    assert header.metadata["last"] == 1
    assert header.metadata["tokens"][-1] == token


def test_every_truncation_is_a_typed_error(tmp_path: Path) -> None:
    data = small_file()
    for length in range(len(data)):
        with pytest.raises(WeightFileError):
            read(tmp_path, data[:length])


def test_truncated_data_name_the_tensor(tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match="data end at byte") as caught:
        read(tmp_path, small_file()[:-1])
    assert caught.value.tensor == "two"
    assert caught.value.file == str(tmp_path / "model.gguf")


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (build_gguf(version=2), "version 2; only version 3"),
        (build_gguf(version=3 << 24), "big-endian"),
        (build_gguf(num_tensors=HUGE), f"claims {HUGE} tensors"),
        (build_gguf(num_keys=HUGE), f"claims {HUGE} metadata keys"),
        (build_gguf({}, num_tensors=1), "tensor name is 0 bytes"),
        (build_gguf(string("") + value(4, bytes(4)), num_keys=1), "metadata key is 0 bytes"),
        (build_gguf(struct.pack("<Q", 1 << 20), num_keys=1), "metadata key is 1048576 bytes"),
        (build_gguf(struct.pack("<Q", HUGE), num_keys=1), "metadata key is"),
        (build_gguf(value(4, bytes(4)) * 2, num_keys=2), "'key' is listed twice"),
        (build_gguf(value(13, bytes(8)), num_keys=1), "unknown value type 13"),
        (build_gguf(value(7, b"\x02"), num_keys=1), "bool must be 0 or 1"),
        (build_gguf(value(8, string(b"\xff")), num_keys=1), "not UTF-8"),
        (build_gguf(value(8, struct.pack("<Q", HUGE)), num_keys=1), "truncated"),
        (build_gguf(value(9, array(0, HUGE)), num_keys=1), "array of"),
        (build_gguf(value(9, array(10, 1 << 22)), num_keys=1), "truncated"),
        (build_gguf(value(9, array(8, 1 << 22)), num_keys=1), "truncated"),
        (build_gguf(value(9, array(13, 1)), num_keys=1), "unknown value type 13"),
        (build_gguf(value(9, array(9, 1) * 9), num_keys=1), "nested more than 4 deep"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_header(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason):
        read(tmp_path, data)


@pytest.mark.parametrize("alignment", [0, 7, 4, 24, 1 << 21, "32", True, 32.0])
def test_refuses_alignment(tmp_path: Path, alignment: object) -> None:
    with pytest.raises(WeightFileError, match=r"general\.alignment must be a power of two"):
        read(tmp_path, build_gguf({"general.alignment": alignment}))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (TensorRecord("w", (), F32, 0), "1 to 4 dimensions, got 0"),
        (TensorRecord("w", (1,) * 5, F32, 0), "1 to 4 dimensions, got 5"),
        (TensorRecord("w", (4, 0), F32, 0), "must be positive"),
        (TensorRecord("w", (1 << 32, 1 << 32), F32, 0), "more than 2\\^63"),
        (TensorRecord("w", (HUGE, HUGE, HUGE, HUGE), F32, 0), "more than 2\\^63"),
        (TensorRecord("w", (33,), TYPE_IDS["q4_1"], 0), "multiple of 32"),
        (TensorRecord("w", (128,), TYPE_IDS["q6_k"], 0), "multiple of 256"),
        (TensorRecord("w", (256,), 15, 0), "Q8_K is not supported; supported: F32, F16, Q4_0"),
        (TensorRecord("w", (256,), 999, 0), "type 999 is not supported"),
        (TensorRecord("w", (4,), F32, 4), "not a multiple of the alignment 32"),
        (TensorRecord("w", (4,), F32, 64), "data end at byte"),
        (TensorRecord("w", (1 << 40,), F32, 0), "data end at byte"),
        (TensorRecord("w", (4,), F32, HUGE - 31), "data end at byte"),
    ],
)
def test_refuses_tensor(tmp_path: Path, record: TensorRecord, reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason) as caught:
        read(tmp_path, build_gguf({}, [record], bytes(64)))
    assert caught.value.tensor == "w"


def test_refuses_duplicate_tensors(tmp_path: Path) -> None:
    records = [TensorRecord("w", (4,), F32, 0), TensorRecord("w", (4,), F32, 32)]
    with pytest.raises(WeightFileError, match="tensor 'w': is listed twice"):
        read(tmp_path, build_gguf({}, records, bytes(64)))


def test_refuses_overlapping_tensors(tmp_path: Path) -> None:
    records = [TensorRecord("a", (9,), F32, 0), TensorRecord("b", (4,), F32, 32)]
    with pytest.raises(WeightFileError, match="tensor 'b': its data overlap those of 'a'"):
        read(tmp_path, build_gguf({}, records, bytes(64)))


def test_refuses_holes_between_tensors(tmp_path: Path) -> None:
    records = [TensorRecord("a", (4,), F32, 0), TensorRecord("b", (4,), F32, 64)]
    with pytest.raises(WeightFileError, match=r"tensor 'b': lies at byte .* ends at byte"):
        read(tmp_path, build_gguf({}, records, bytes(96)))
    with pytest.raises(WeightFileError, match="tensor 'b': lies at byte"):
        read(tmp_path, build_gguf({}, records[1:], bytes(96)))


def test_arrays_of_arrays_are_bounded(tmp_path: Path) -> None:
    inner = array(0, 0) * 300_000
    data = build_gguf(value(9, array(9, 300_000, inner)), num_keys=1)
    with pytest.raises(WeightFileError, match="key: array of 300000 items"):
        read(tmp_path, data)


def test_missing_file_and_folder_are_typed_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(WeightFileError, match="cannot be read"):
            read_gguf(path)


@settings(max_examples=150, deadline=None)
@given(tail=st.binary(max_size=400))
@example(tail=b"")
def test_any_bytes_parse_or_are_refused(tail: bytes) -> None:
    fuzz_gguf(tail)
    fuzz_gguf(b"GGUF" + struct.pack("<I", 3) + tail)


@settings(max_examples=300)
@given(data=mutations(small_file()))
def test_any_damage_parses_or_is_refused(data: bytes) -> None:
    fuzz_gguf(data)


@settings(max_examples=200)
@given(data=mutations(Gguf().build()))
def test_any_damage_to_a_model_loads_or_is_refused(data: bytes) -> None:
    fuzz_gguf(data)
