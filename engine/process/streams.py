"""Open streams of an engine client: outputs arrive by step and leave by request."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable

from ..errors import InvalidRequestError, QuireError
from ..outputs import RowError, SequenceOutput
from ..request import Request
from .signals import Signal


class _Stream:
    """Queue of one request's outputs that its one reader has not taken yet.

    `asyncio.Queue` supports many readers, at several times the cost per token.
    """

    __slots__ = ("filled", "items", "open_choices")

    def __init__(self, n: int) -> None:
        self.items: deque[SequenceOutput | QuireError] = deque()
        self.open_choices = set(range(n))
        self.filled = Signal()

    def put(self, item: SequenceOutput | QuireError) -> None:
        self.items.append(item)
        self.filled.set()


class StreamTable:
    """Distribute the outputs of each step to the streams of their requests. For one event loop.

    `submit` sends a request to the engine; `abort` ends one there.
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
        """Number of streams with outputs still to come; the others only wait for their reader."""
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
                while not stream.items:
                    await stream.filled.wait()
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
        """Hand out a step's outputs, dropping those of streams that have been closed."""
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                stream.open_choices.discard(output.choice)
            stream.put(output)

    def reject(self, request_id: str, error: QuireError) -> None:
        """Make the request's `generate` raise `error`, with which the engine refused it."""
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
