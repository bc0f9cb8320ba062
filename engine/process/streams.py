"""Open streams of an engine client: outputs come in by step and go out by request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Protocol

from ..config import EngineInfo
from ..errors import InvalidRequestError, QuireError
from ..outputs import EngineStats, RowError, SequenceOutput, StepOutput
from ..request import Request


class EngineCoreProtocol(Protocol):
    """What a client steps: `engine_core.EngineCore`, or a fake of it."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def has_work(self) -> bool: ...

    def add_request(self, request: Request) -> None: ...

    def abort_request(self, request_id: str, choice: int | None = None) -> None: ...

    def step(self) -> StepOutput: ...

    def reset_prefix_cache(self) -> None: ...

    def stats(self) -> EngineStats: ...


class EngineObserver(Protocol):
    """Who wants to know how the engine fares; called on the event loop."""

    def engine_ready(self, info: EngineInfo) -> None: ...

    def engine_restarted(self) -> None: ...

    def observe_step(self, stats: EngineStats) -> None: ...


class _Stream:
    """What came for one request and was not read yet; a queue of one reader.

    `asyncio.Queue` does the same for many readers, at several times the cost of a token.
    """

    __slots__ = ("_waiting", "items", "open_choices")

    def __init__(self, n: int) -> None:
        self.items: deque[SequenceOutput | QuireError] = deque()
        self.open_choices = set(range(n))
        self._waiting: asyncio.Future[None] | None = None

    def put(self, item: SequenceOutput | QuireError) -> None:
        self.items.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self) -> None:
        """Until there are items."""
        while not self.items:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting


class StreamTable:
    """Demultiplexes; all calls on one event loop.

    `submit` sends a request to the engine, `abort` ends one there.
    """

    def __init__(
        self, submit: Callable[[Request], None], abort: Callable[[str, int | None], None]
    ) -> None:
        self._submit = submit
        self._abort = abort
        self._streams: dict[str, _Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def num_unfinished(self) -> int:
        """Streams that the engine owes something; others only wait for their reader."""
        return sum(bool(stream.open_choices) for stream in self._streams.values())

    async def generate(self, request: Request) -> AsyncGenerator[SequenceOutput, None]:
        """Submit, then yield until each choice has ended; see `EngineClient.generate`."""
        if request.request_id in self._streams:
            raise InvalidRequestError(f"request id {request.request_id} is in use", "request_id")
        stream = _Stream(request.sampling_params.n)
        self._submit(request)
        self._streams[request.request_id] = stream
        waiting_for = set(stream.open_choices)
        try:
            while waiting_for:
                if not stream.items:
                    await stream.wait()
                item = stream.items.popleft()
                if isinstance(item, QuireError):
                    raise item
                if item.finish_reason is not None:
                    waiting_for.discard(item.choice)
                yield item
        finally:
            del self._streams[request.request_id]
            if stream.open_choices:
                self._abort(request.request_id, None)

    def deliver(self, outputs: Iterable[SequenceOutput]) -> None:
        """Hand a step's outputs out; those of streams closed meanwhile are dropped."""
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                stream.open_choices.discard(output.choice)
            stream.put(output)

    def reject(self, request_id: str, error: QuireError) -> None:
        """The engine refused the request: `generate` raises `error`."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.open_choices.clear()
            stream.put(error)

    def fail_all(self, error: QuireError) -> None:
        """End every open choice with finish_reason "error"."""
        row_error = RowError(error.code, error.message)
        self.deliver(
            SequenceOutput(request_id, choice, [], finish_reason="error", error=row_error)
            for request_id, stream in self._streams.items()
            for choice in sorted(stream.open_choices)
        )
