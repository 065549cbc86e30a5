"""Times the same work in torch, where torch and a GPU are there."""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["TorchPeer"]

_FLUSH_BYTES = 256 << 20  # as CallStream::time of the bindings
_WARM_UP = 3
_ROOM = 0.9  # of the free memory that inputs may take

Call = Callable[[], object]


class TorchPeer:
    """Microseconds of torch's own operations, timed as the kernels are: by events, with the cache
    flushed before each run. None where there is no torch, no memory, or no such operation."""

    def __init__(self, enabled: bool = True) -> None:
        self._torch = _torch() if enabled else None

    def time(self, make: Callable[[Any], Call], *, nbytes: float, repeats: int) -> float | None:
        """Median of ``repeats`` runs of ``make(torch)``, whose inputs take ``nbytes``."""
        torch = self._torch
        if torch is None:
            return None
        try:
            free, _ = torch.cuda.mem_get_info()
            if nbytes + _FLUSH_BYTES > _ROOM * free:
                return None
            with torch.inference_mode():
                return self._run(torch, make(torch), repeats)
        except Exception as error:  # a peer that fails costs its column only
            print(f"torch: {error}", file=sys.stderr)
            return None
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    @staticmethod
    def _run(torch: Any, call: Call, repeats: int) -> float:
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        times = []
        for i in range(_WARM_UP + repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            if i >= _WARM_UP:
                times.append(1000.0 * begin.elapsed_time(end))
        return statistics.median(times)


def _torch() -> ModuleType | None:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None
