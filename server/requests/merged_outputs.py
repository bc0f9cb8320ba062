"""The engine's outputs for several requests, merged in the order in which they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import cast

from ...engine.client import EngineClient
from ...engine.outputs import SequenceOutput
from ...engine.request import Request


async def merged_outputs(
    engine: EngineClient, requests: Sequence[Request]
) -> AsyncGenerator[tuple[int, SequenceOutput], None]:
    """Run all requests at once, and yield pairs of a request's position and one of its outputs.

    The first error of a request ends the others. Closing the iterator aborts those that still run.
    """
    # 1. One request, the usual case, needs no tasks.
    if len(requests) == 1:
        async with aclosing(_generator(engine.generate(requests[0]))) as outputs:
            async for output in outputs:
                yield 0, output
        return
    # 2. Otherwise a task for each request moves its outputs into one queue, which None ends. The
    #    queue is unbounded like the engine client's own: max_tokens bounds both.
    queue: asyncio.Queue[tuple[int, SequenceOutput] | None] = asyncio.Queue()

    async def pump(position: int, request: Request) -> None:
        async with aclosing(_generator(engine.generate(request))) as outputs:
            async for output in outputs:
                queue.put_nowait((position, output))

    async def pump_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for position, request in enumerate(requests):
                    group.create_task(pump(position, request))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    pumps = asyncio.create_task(pump_all())
    pumps.add_done_callback(lambda _: queue.put_nowait(None))
    # 3. Yield from the queue. Awaiting the tasks raises their error, if there is one.
    try:
        while (item := await queue.get()) is not None:
            yield item
        await pumps
    finally:
        pumps.cancel()
        await asyncio.wait({pumps})


def _generator(outputs: AsyncIterator[SequenceOutput]) -> AsyncGenerator[SequenceOutput, None]:
    """Return `outputs` as a generator: EngineClient promises that closing its iterator aborts, so
    it is one that can be closed."""
    return cast("AsyncGenerator[SequenceOutput, None]", outputs)
