"""Bounds of hyper-parameters, and checks that both file formats need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from rapshee_engine.errors import WeightFileError
from rapshee_engine.models.config import RopeConfig
from rapshee_engine.models.fields import Fields
from rapshee_engine.models.rope import FloatArray

__all__ = [
    "MAX_CONTEXT",
    "MAX_HEADS",
    "MAX_HEAD_DIM",
    "MAX_LAYERS",
    "MAX_SIZE",
    "check_groups",
    "read_head_dim",
    "rope_config",
    "unchecked",
]

# Far beyond any model; they keep products of two sizes within 64 bits and tables small.
MAX_SIZE = 1 << 24
MAX_LAYERS = 1 << 12
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12
MAX_CONTEXT = 1 << 30

_Function = TypeVar("_Function", bound=Callable[..., object])


def unchecked(function: _Function) -> _Function:
    """Absurd values may overflow on the way; `rope_config` refuses what comes out of them."""
    return np.errstate(over="ignore", divide="ignore", invalid="ignore")(function)


def rope_config(fields: Fields, inv_freq: FloatArray, attention_factor: float = 1.0) -> RopeConfig:
    """Raises `WeightFileError` where the numbers are not finite."""
    if not (np.isfinite(inv_freq).all() and np.isfinite(np.float32(attention_factor))):
        raise WeightFileError(fields.source, "its rotary frequencies are not finite numbers")
    return RopeConfig(tuple(inv_freq.tolist()), float(attention_factor))


def check_groups(fields: Fields, key: str, num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise WeightFileError(
            fields.source, f"{num_heads} heads cannot share {num_kv_heads} key-value heads ({key})"
        )


def read_head_dim(
    fields: Fields, key: str, hidden_size: int, num_heads: int, default: int | None = None
) -> int:
    """Width of a head: the key, else ``default``, else the hidden size's share of a head."""
    if not fields.has(key) and default is None and hidden_size % num_heads:
        raise WeightFileError(
            fields.source, f"a width of {hidden_size} cannot be split into {num_heads} heads"
        )
    head_dim = fields.integer(key, 1, MAX_HEAD_DIM, default or hidden_size // num_heads)
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise WeightFileError(
            fields.source, f"heads must be even and at most {MAX_HEAD_DIM} wide, got {head_dim}"
        )
    return head_dim
