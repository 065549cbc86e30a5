"""What both file formats say about a tensor, and the checks that both need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from rapshee_engine.errors import WeightFileError

__all__ = ["BLOCK_LAYOUTS", "MAX_DIMS", "TensorInfo", "check_no_overlap", "tensor_nbytes"]

# dtype -> (values in a block, bytes of a block). A block never crosses a row.
BLOCK_LAYOUTS = MappingProxyType(
    {
        "f32": (1, 4),
        "f16": (1, 2),
        "bf16": (1, 2),
        "q4_0": (32, 18),  # f16 scale, 32 nibbles
        "q4_1": (32, 20),  # f16 scale, f16 minimum, 32 nibbles
        "q5_0": (32, 22),  # f16 scale, 32 bits, 32 nibbles
        "q5_1": (32, 24),  # f16 scale, f16 minimum, 32 bits, 32 nibbles
        "q8_0": (32, 34),  # f16 scale, 32 bytes
        # 16 groups of 16, or 8 of 32 (q4_k, q5_k), their scales small integers; see
        # csrc/quant/formats.h.
        "q2_k": (256, 84),
        "q3_k": (256, 110),
        "q4_k": (256, 144),
        "q5_k": (256, 176),
        "q6_k": (256, 210),
    }
)

MAX_DIMS = 4
_MAX_ELEMENTS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a weight file.

    Attributes:
        name: as in the file.
        dtype: a key of `BLOCK_LAYOUTS`.
        shape: outermost dimension first.
        offset: bytes from the start of the file.
        nbytes: bytes that the tensor occupies.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor.

    Raises:
        ValueError: the shape is not one that a tensor of that dtype can have.
    """
    if not 1 <= len(shape) <= MAX_DIMS:
        raise ValueError(f"must have 1 to {MAX_DIMS} dimensions, got {len(shape)}")
    if min(shape) < 1:
        raise ValueError(f"all dimensions must be positive, got {list(shape)}")
    elements = math.prod(shape)
    if elements > _MAX_ELEMENTS:
        raise ValueError(f"shape {list(shape)} has more than 2^63 - 1 elements")
    block_values, block_bytes = BLOCK_LAYOUTS[dtype]
    if shape[-1] % block_values:
        raise ValueError(
            f"rows of {dtype} must be a multiple of {block_values} long, got {shape[-1]}"
        )
    return elements // block_values * block_bytes


def check_no_overlap(file: str, tensors: Iterable[TensorInfo]) -> None:
    """Raise `WeightFileError` where two tensors share bytes."""
    previous: TensorInfo | None = None
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if previous is not None and tensor.offset < previous.offset + previous.nbytes:
            raise WeightFileError(
                file, f"its data overlap those of {previous.name!r}", tensor=tensor.name
            )
        previous = tensor
