"""The trace of the present request, through which a generation reports itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from ...engine.request import Request
from ..metrics.histograms import RequestRecord


@dataclass(frozen=True, slots=True)
class EndedGeneration:
    """A generation that has ended: the engine's requests, the record of each, how many of their
    prompt tokens were found in the cache, and the code of the error with which they failed, if
    any."""

    requests: Sequence[Request]
    records: Sequence[RequestRecord]
    num_cached_tokens: int
    error: str | None


class RequestTrace(Protocol):
    """The trace of one HTTP request. It ends when its answer and all its generations have ended, in
    whatever order: a response that runs in the background outlives its HTTP answer."""

    @property
    def trace_id(self) -> str | None:
        """The trace's id as 32 hexadecimal digits; None if the trace is not sampled."""

    def generation_began(self) -> None:
        """Keep the trace open until `generation_ended`."""

    def generation_ended(self, ended: EndedGeneration) -> None:
        """Record a generation."""


current: ContextVar[RequestTrace | None] = ContextVar("current_trace", default=None)
"""Set by TracingMiddleware for the requests that are traced."""
