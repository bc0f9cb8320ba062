"""What the HTTP side knows of the engine: submit, abort, observe."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol

from .config import EngineInfo
from .outputs import EngineStats, SequenceOutput
from .request import Request


class EngineHealth(NamedTuple):
    """`alive` is False when work waits and no step finishes (or the engine is given up);
    `ready` is False also while it loads, restarts or drains. `reason` is for a person."""

    alive: bool
    ready: bool
    reason: str
    restarts: int


class EngineClient(Protocol):
    """The engine as the HTTP side sees it; in a process of its own, or inline for tests."""

    @property
    def info(self) -> EngineInfo:
        """Raises EngineNotReadyError before the engine's first start has succeeded."""

    async def start(self) -> None:
        """Launch the engine and return at once; `health().ready` turns True when it serves."""

    def generate(self, request: Request) -> AsyncIterator[SequenceOutput]:
        """Submit and stream; ends after every one of the n sequences has a finish_reason.

        A failure of the engine arrives as outputs with finish_reason "error" (code
        `engine_dead`), never as an exception in mid-stream. Raises EngineNotReadyError if the
        engine is not serving when it is submitted. Closing the iterator early aborts.
        """

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End one sequence (or all of a request's) with "abort"; unknown ids are ignored."""

    def stats(self) -> EngineStats | None:
        """The latest snapshot; None before the first."""

    def health(self) -> EngineHealth: ...

    async def reset_prefix_cache(self) -> None:
        """Forget every cached block that no sequence holds."""

    async def close(self) -> None:
        """Stop the engine; open streams get a terminal error. Idempotent."""
