from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.mutations import mutations
from fuzz.targets import fuzz_safetensors
from rapshee_engine.errors import WeightFileError
from rapshee_engine.weights.safetensors import read_safetensors
from rapshee_engine.weights.tensor_info import TensorInfo
from reference.safetensors_writer import build_safetensors, write_safetensors


def read(tmp_path: Path, data: bytes) -> Mapping[str, TensorInfo]:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return read_safetensors(path)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


def small_file() -> bytes:
    return build_safetensors(
        {
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
            "a": entry(),
        },
        bytes(32),
    )


def test_reads_tensors(tmp_path: Path) -> None:
    data = small_file()
    start = len(data) - 32
    assert read(tmp_path, data) == {
        "a": TensorInfo("a", "f32", (2, 3), start, 24),
        "b": TensorInfo("b", "bf16", (4,), start + 24, 8),
    }


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_reads_each_dtype(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": (dtype, np.ones((3, 5), dtype=np.float32))})
    info = read_safetensors(path)["w"]
    assert (info.dtype, info.shape) == (dtype, (3, 5))
    assert info.offset + info.nbytes == path.stat().st_size


def test_every_truncation_is_a_typed_error(tmp_path: Path) -> None:
    data = small_file()
    for length in range(len(data)):
        with pytest.raises(WeightFileError):
            read(tmp_path, data[:length])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "only 0 bytes long"),
        (b"1234567", "only 7 bytes long"),
        (build_safetensors(b"{", length=1), "not valid JSON"),
        (build_safetensors({}, length=(32 << 20) + 1), "claims a header of 33554433 bytes"),
        (build_safetensors({}, length=(1 << 64) - 1), "claims a header of"),
        (build_safetensors({}, length=50_000), "a header of 50000 bytes in a file of 10"),
        (build_safetensors(b"[1, 2]"), "must hold a JSON object"),
        (build_safetensors(b"{" * 100), "not valid JSON"),
        (build_safetensors(b'{"a":' * 100_000), "nested too deeply"),
        (build_safetensors(b'{"a": 1, "a": 2}'), "'a' is listed twice"),
        (build_safetensors({"__metadata__": {"a": 1}}), "must map strings to strings"),
        (build_safetensors({"__metadata__": []}), "must map strings to strings"),
        (build_safetensors({}, bytes(8)), "holds 8 bytes of data, its tensors 0"),
        (build_safetensors({"a": entry()}, bytes(25)), "holds 25 bytes of data, its tensors 24"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_header(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason):
        read(tmp_path, data)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (None, "exactly dtype, shape and data_offsets"),
        ([], "exactly dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": [6]}, "exactly dtype, shape and data_offsets"),
        (entry(extra=1), "exactly dtype, shape and data_offsets"),
        (entry(dtype="I64"), "'I64' is not supported; supported: F32, F16, BF16"),
        (entry(dtype=None), "None is not supported"),
        (entry(dtype=["F32"]), "is not supported"),
        (entry(shape="23"), "shape must be a list of integers"),
        (entry(shape=[2, 3.0]), "shape must be a list of integers"),
        (entry(shape=[6, True]), "shape must be a list of integers"),
        (entry(shape=[]), "1 to 4 dimensions"),
        (entry(shape=[1, 1, 1, 2, 3]), "1 to 4 dimensions"),
        (entry(shape=[-2, -3]), "must be positive"),
        (entry(shape=[0], data_offsets=[0, 0]), "must be positive"),
        (entry(shape=[1 << 62, 1 << 62]), "more than 2\\^63"),
        (entry(shape=[2, 4]), "takes 32 bytes, data_offsets give 24"),
        (entry(dtype="F16"), "takes 12 bytes, data_offsets give 24"),
        (entry(data_offsets=[0, 24, 24]), "must be a range"),
        (entry(data_offsets=[0]), "must be a range"),
        (entry(data_offsets=[24, 0]), "must be a range"),
        (entry(data_offsets=[-24, 0]), "must be a range"),
        (entry(data_offsets=[8, 32]), "must be a range of the file's 24 bytes"),
        (entry(data_offsets=[0, 1 << 70]), "must be a range"),
        (entry(data_offsets=None), "data_offsets must be a list of integers"),
    ],
)
def test_refuses_tensor(tmp_path: Path, fields: Any, reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason) as caught:
        read(tmp_path, build_safetensors({"w": fields}, bytes(24)))
    assert caught.value.tensor == "w"


def test_refuses_overlapping_tensors(tmp_path: Path) -> None:
    header = {"a": entry(), "b": entry(shape=[2], data_offsets=[20, 28])}
    with pytest.raises(WeightFileError, match="tensor 'b': its data overlap those of 'a'"):
        read(tmp_path, build_safetensors(header, bytes(28)))


def test_refuses_gaps(tmp_path: Path) -> None:
    header = {"a": entry(), "b": entry(shape=[2], data_offsets=[28, 36])}
    with pytest.raises(WeightFileError, match="holds 36 bytes of data, its tensors 32"):
        read(tmp_path, build_safetensors(header, bytes(36)))


def test_missing_file_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match="cannot be read"):
        read_safetensors(tmp_path / "absent.safetensors")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(header=st.binary(max_size=200), data=st.binary(max_size=32))
def test_any_bytes_parse_or_are_refused(header: bytes, data: bytes) -> None:
    fuzz_safetensors(header)
    fuzz_safetensors(struct.pack("<Q", len(header)) + header + data)


@settings(max_examples=300)
@given(data=mutations(small_file()))
def test_any_damage_parses_or_is_refused(data: bytes) -> None:
    fuzz_safetensors(data)


@settings(max_examples=100, deadline=None)
@given(
    header=st.dictionaries(
        st.sampled_from(["__metadata__", "a", "b"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "I8"]) | JSON_VALUES,
                "shape": st.lists(st.integers(-1, 4), max_size=5) | JSON_VALUES,
                "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | JSON_VALUES,
            }
        )
        | JSON_VALUES,
    )
)
def test_any_header_object_parses_or_is_refused(header: dict[str, Any]) -> None:
    fuzz_safetensors(build_safetensors(header, bytes(32)))
