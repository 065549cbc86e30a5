from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from rapshee_engine.server.merge import merged


class Source:
    """Yields what it is given to; says whether it was closed."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[int | Exception | None] = asyncio.Queue()
        self.is_closed = False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.is_closed = True


def test_items_come_as_they_are_there() -> None:
    async def scenario() -> list[list[tuple[int, int]]]:
        a, b = Source(), Source()
        batches = []
        async with aclosing(merged([a.items(), b.items()])) as stream:
            a.queue.put_nowait(1)
            b.queue.put_nowait(2)
            batches.append(await anext(stream))
            b.queue.put_nowait(3)
            batches.append(await anext(stream))
            b.queue.put_nowait(None)
            a.queue.put_nowait(4)
            a.queue.put_nowait(None)
            batches += [batch async for batch in stream]
        assert a.is_closed
        assert b.is_closed
        return batches

    assert asyncio.run(scenario()) == [[(0, 1), (1, 2)], [(1, 3)], [(0, 4)]]


def test_nothing_of_nothing() -> None:
    async def scenario() -> list[list[tuple[int, int]]]:
        streams: list[AsyncGenerator[int, None]] = []
        return [batch async for batch in merged(streams)]

    assert asyncio.run(scenario()) == []


def test_an_error_closes_all() -> None:
    async def scenario() -> None:
        a, b = Source(), Source()
        stream = merged([a.items(), b.items()])
        b.queue.put_nowait(1)
        assert await anext(stream) == [(1, 1)]
        a.queue.put_nowait(ValueError("on demand"))
        with pytest.raises(ValueError, match="on demand"):
            await anext(stream)
        assert a.is_closed
        assert b.is_closed

    asyncio.run(scenario())


def test_the_first_of_two_errors_counts_and_neither_is_left_unread() -> None:
    unread: list[object] = []

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unread.append(context))
        a, b = Source(), Source()
        a.queue.put_nowait(ValueError("first"))
        b.queue.put_nowait(ValueError("second"))
        with pytest.raises(ValueError, match="first"):
            await anext(merged([a.items(), b.items()]))
        gc.collect()

    asyncio.run(scenario())
    assert unread == []


def test_leaving_closes_all() -> None:
    async def scenario() -> None:
        a, b = Source(), Source()
        async with aclosing(merged([a.items(), b.items()])) as stream:
            a.queue.put_nowait(1)
            await anext(stream)
        assert a.is_closed
        assert b.is_closed

    asyncio.run(scenario())
