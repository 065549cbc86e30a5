"""Quantised checkpoints on the disk, made once and checked before each use."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rapshee_engine.weights.loader import Checkpoint
from rapshee_engine.weights.quantize import QuantizationPlan, plan_quantization

__all__ = ["quantized"]

_logger = logging.getLogger(__name__)


@contextmanager
def quantized(
    checkpoint: Checkpoint, mode: str, cache: Path, threads: int | None
) -> Iterator[Checkpoint]:
    """The checkpoint with low-bit matrices, to be loaded inside the ``with``.

    They lie in ``quantized/`` of the cache folder. A file there is used only if its digest is
    right; a damaged one is replaced, by a rename, so that whoever reads it at that time is not
    disturbed, nor are processes that quantise at the same time. Where the folder cannot be written,
    a warning says so and they are made in memory, each time.

    Raises:
        ConfigError: see `plan_quantization`.
        WeightFileError: a matrix cannot be read, or holds what has no low-bit form.
    """
    plan = plan_quantization(checkpoint, mode)
    path = cache / "quantized" / f"{Path(checkpoint.path).stem}-{mode}-{plan.key}.gguf"
    if _is_kept(path, plan, threads):
        yield plan.checkpoint_in(str(path))
        return
    with _in_memory(plan, threads) as file:
        yield plan.checkpoint_in(file)


def _is_kept(path: Path, plan: QuantizationPlan, threads: int | None) -> bool:
    """Whether the right file lies at ``path``; it is made if need be, unless it cannot be kept."""
    try:
        if not _is_usable(path, plan):
            _write(path, plan, threads)
    except OSError as error:
        _logger.warning(
            "cannot keep quantised weights in %s (%s): they are made anew at each start; "
            "RAPSHEE_CACHE names another folder",
            path.parent,
            error.strerror,
        )
        return False
    return True


def _is_usable(path: Path, plan: QuantizationPlan) -> bool:
    try:
        with path.open("rb") as stream:
            if plan.matches(stream):
                return True
    except FileNotFoundError:
        return False
    _logger.warning("%s is damaged: it is made anew", path)
    return False


def _write(path: Path, plan: QuantizationPlan, threads: int | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=".quantize-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            plan.write(stream, threads)
            os.fsync(stream.fileno())
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


@contextmanager
def _in_memory(plan: QuantizationPlan, threads: int | None) -> Iterator[str]:
    """Path of a file that has no place on any disk."""
    descriptor = os.memfd_create("rapshee-quantized", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "wb") as stream:
        plan.write(stream, threads)
        yield f"/proc/self/fd/{descriptor}"
