"""Several streams read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

__all__ = ["merged"]

T = TypeVar("T")


async def merged(
    streams: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[list[tuple[int, T]], None]:
    """Batches of (index of the stream, item): what is there at once, at most one item a stream.

    A stream's items keep their order. The first error ends all; so does leaving the iteration. All
    streams are closed at the end.
    """
    reading = {asyncio.ensure_future(anext(s)): i for i, s in enumerate(streams)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            batch = []
            for task in sorted(done, key=reading.__getitem__):
                index = reading.pop(task)  # what an error leaves in `reading` is looked at below
                if isinstance(task.exception(), StopAsyncIteration):
                    continue
                batch.append((index, task.result()))
                reading[asyncio.ensure_future(anext(streams[index]))] = index
            if batch:
                yield batch
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
