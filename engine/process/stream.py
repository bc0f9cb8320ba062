"""One open request of an engine client: what it has delivered, and how it goes on elsewhere.

A stream outlives its engine: `Stream.continuation` is the request as another engine is to continue
it. With it is `Signal`, by which its reader waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Protocol

from ..config import EngineInfo
from ..errors import QueueTimeoutError, QuireError, RequestTimeoutError
from ..outputs import RowError, SequenceOutput
from ..request import Request

MAX_DEATHS = 2
"""Deaths of engines that a request survives while they compute it; the next one ends it, since it
may be what kills them. So that its neighbours do not end with it, requests that have reached this
number go on one at a time (`Request.on_trial`)."""


class Signal:
    """Wake the one task that waits, if one does. For use on one event loop.

    Unlike `asyncio.Event` it keeps no state: a `set` that nobody waits for is lost, so the waiter
    checks its condition first and after each `wait`.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Return after the next `set`."""
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def set(self) -> None:
        """Wake the waiter."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class Place(Protocol):
    """An engine that streams are sent to, as the table sees it."""

    @property
    def info(self) -> EngineInfo: ...

    def add_request(self, request: Request) -> None:
        """Send a request to the engine."""

    def abort_request(self, request_id: str, choice: int | None) -> None:
        """End one choice of a request there, or all of them."""


class _Choice:
    """What one choice has delivered: its tokens, and what was said with the first of them."""

    __slots__ = ("first_token", "num_cached", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.num_cached: int | None = None
        self.first_token: float | None = None
        """Seconds from the request's arrival to its first token."""


class Stream:
    """Queue of one request's outputs that its one reader has not taken yet.

    `asyncio.Queue` supports many readers, at several times the cost per token.
    """

    __slots__ = (
        "aborted",
        "choices",
        "deaths",
        "filled",
        "info",
        "items",
        "losses",
        "moves",
        "open_choices",
        "place",
        "request",
        "runs",
        "scheduled",
        "timer",
    )

    def __init__(self, request: Request) -> None:
        n = request.sampling_params.n
        self.request = request
        self.items: deque[SequenceOutput | QuireError] = deque()
        self.open_choices = set(range(n))
        self.choices = [_Choice() for _ in range(n)]
        self.filled = Signal()
        self.place: Place | None = None
        """The engine that has it; None while it waits for one."""
        self.info: EngineInfo | None = None
        """Facts about the engine that had it last, as they were when it was sent there."""
        self.runs = False
        """Whether that engine has begun to compute it."""
        self.scheduled: float | None = None
        """Seconds from the request's arrival until an engine first began it."""
        self.aborted: set[int] = set()
        """Choices that their reader has given up, and whose engine was told."""
        self.moves = self.losses = self.deaths = 0
        """How often it has left an engine, how often one that died, and while it was computed."""
        self.timer: asyncio.TimerHandle | None = None

    @property
    def sent_id(self) -> str:
        """The request's id at the engine that has it."""
        request_id = self.request.request_id
        return f"{request_id}~{self.moves}" if self.moves else request_id

    @property
    def has_delivered(self) -> bool:
        """Whether its reader has got anything."""
        n = len(self.choices)
        return len(self.open_choices) < n or any(choice.token_ids for choice in self.choices)

    def put(self, item: SequenceOutput | QuireError) -> None:
        self.items.append(item)
        self.filled.set()

    def take(self, output: SequenceOutput) -> None:
        """Note an output from the engine and pass it to the reader."""
        choice = self.choices[output.choice]
        if not choice.token_ids:
            self._note_first(choice, output)
        choice.token_ids += output.token_ids
        if output.finish_reason is not None:
            self.open_choices.discard(output.choice)
        self.put(self._as_if_unmoved(choice, output) if self.moves else output)

    def end(self, choices: Collection[int], **fields: Any) -> None:
        """End those of the choices that are open."""
        for choice in sorted(self.open_choices.intersection(choices)):
            self.open_choices.discard(choice)
            self.put(SequenceOutput(self.request.request_id, choice, [], **fields))

    def fail(self, error: QuireError) -> None:
        """End every open choice with this error."""
        row_error = RowError(error.code, error.message)
        self.end(self.open_choices, finish_reason="error", error=row_error)

    def continuation(self) -> Request:
        """Return the request as it goes on from here."""
        request, params = self.request, self.request.sampling_params
        if not self.moves:
            return request
        resume: tuple[tuple[int, ...] | None, ...] = ()
        if self.has_delivered:
            resume = tuple(
                tuple(choice.token_ids) if index in self.open_choices else None
                for index, choice in enumerate(self.choices)
            )
        # Log-probabilities of the prompt come with the first output of choice 0.
        if params.prompt_logprobs is not None and (resume and resume[0] != ()):
            params = replace(params, prompt_logprobs=None)
        return replace(
            request,
            request_id=self.sent_id,
            sampling_params=params,
            queue_deadline=None if self.scheduled is not None else request.queue_deadline,
            resume=resume,
            on_trial=self.deaths >= MAX_DEATHS,
        )

    def limit(self, now: float) -> tuple[float, QuireError] | None:
        """Return when its wait for an engine ends, which begins `now`, and how; None if never."""
        request, limits = self.request, list[tuple[float, QuireError]]()
        if request.deadline is not None:
            limits.append(
                (request.deadline, RequestTimeoutError("the request's time limit passed"))
            )
        if request.queue_deadline is not None:
            until, text = request.queue_deadline, "the time limit for waiting passed"
            if self.scheduled is not None:  # it waits again, for as long as any request may wait
                until = now + request.queue_deadline - request.arrival_time
                text = "no engine went on with the request within the time limit for waiting"
            limits.append((until, QueueTimeoutError(text)))
        return min(limits, key=lambda limit: limit[0], default=None)

    def _note_first(self, choice: _Choice, output: SequenceOutput) -> None:
        if choice.num_cached is None:
            choice.num_cached = output.num_cached_tokens
        if output.token_ids:
            choice.first_token = time.monotonic() - self.request.arrival_time

    def _as_if_unmoved(self, choice: _Choice, output: SequenceOutput) -> SequenceOutput:
        """Return an output of a request that has moved as it would be if it had not."""
        if output.token_ids and self.deaths >= MAX_DEATHS:
            self.deaths = MAX_DEATHS - 1  # it has got a token, so the engine survived it
        output = output._replace(request_id=self.request.request_id)
        if output.num_cached_tokens is not None:
            output = output._replace(num_cached_tokens=choice.num_cached)
        if output.timings is not None:
            timings = output.timings
            # What is measured here includes the way of the message, so it may seem to be later
            # than what came after it.
            end = timings.finished
            first_token = _earlier(choice.first_token, timings.first_token, end)
            begin = end if first_token is None else first_token
            scheduled = _earlier(self.scheduled, timings.scheduled, begin)
            output = output._replace(
                timings=timings._replace(scheduled=scheduled, first_token=first_token)
            )
        return output


def _earlier(one: float | None, other: float | None, bound: float) -> float | None:
    """Return the earlier of two times if there is any, and never more than `bound`."""
    known = [time for time in (one, other) if time is not None]
    return min(*known, bound) if known else None
