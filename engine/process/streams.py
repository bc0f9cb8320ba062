"""Open streams of an engine client: outputs arrive by step and leave by request.

A stream outlives its engine. The table keeps what each choice has delivered, so that another
engine, or the same one after its restart, can go on exactly where this one stopped:

    engine dies ─▶ detach: its streams wait ─▶ resume: each is sent with its tokens (Request.resume)
                           │ no engine in time, or it is the request that kills engines
                           └─▶ its open choices end with an error

An engine that is only slow may still send outputs of a stream that has moved. So a moved request
has another id at each engine, and outputs under an earlier one are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from dataclasses import replace
from typing import Any, Protocol

from ..client import Fingerprint
from ..config import EngineInfo
from ..errors import (
    EngineDeadError,
    EngineNotReadyError,
    InvalidRequestError,
    QueueTimeoutError,
    QuireError,
    RequestTimeoutError,
)
from ..outputs import RowError, SequenceOutput
from ..request import Request
from .signals import Signal

MAX_DEATHS = 2
"""Deaths of engines that a request survives while they compute it; the next one ends it, since it
may be what kills them. So that its neighbours do not end with it, requests that have reached this
number go on one at a time, the next when the one before has got a token."""
MAX_MOVES = 4
"""Moves of a request in total, those from engines that had not begun it included: an engine may die
before it can say that it has begun a request."""

logger = logging.getLogger("quire.engine.client")


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


class _Stream:
    """Queue of one request's outputs that its one reader has not taken yet.

    `asyncio.Queue` supports many readers, at several times the cost per token.
    """

    __slots__ = (
        *("aborted", "choices", "deaths", "filled", "info", "items", "moves", "open_choices"),
        *("place", "request", "runs", "scheduled", "timer"),
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
        self.moves = self.deaths = 0
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
        output = output._replace(request_id=self.request.request_id)
        if output.num_cached_tokens is not None:
            output = output._replace(num_cached_tokens=choice.num_cached)
        if output.timings is not None:
            timings = output.timings
            output = output._replace(
                timings=timings._replace(
                    scheduled=_earlier(self.scheduled, timings.scheduled),
                    first_token=_earlier(choice.first_token, timings.first_token),
                )
            )
        return output


def _earlier(one: float | None, other: float | None) -> float | None:
    return min((time for time in (one, other) if time is not None), default=None)


class StreamTable:
    """Distribute the outputs of each step to the streams of their requests. For one event loop.

    `choose` returns the engine for a request, or raises EngineNotReadyError. It is also given the
    facts about the engine that began the request, or None for a request that has delivered nothing.
    """

    def __init__(self, choose: Callable[[Request, EngineInfo | None], Place]) -> None:
        self._choose = choose
        self._streams: dict[str, _Stream] = {}
        """All open streams, by their request's id."""
        self._sent: dict[str, _Stream] = {}
        """Those that an engine has, by the id that the request has there."""
        self._probation: _Stream | None = None
        """The stream that goes on after MAX_DEATHS and has not got a token since."""

    def __len__(self) -> int:
        return len(self._streams)

    def num_unfinished(self, place: Place) -> int:
        """Return how many streams have outputs still to come from this engine; others only wait for
        their reader, or for an engine."""
        return sum(
            bool(stream.open_choices) for stream in self._sent.values() if stream.place is place
        )

    # --- the reader's side

    async def generate(self, request: Request) -> AsyncGenerator[SequenceOutput, None]:
        """Submit, then yield until each choice has ended; see `EngineClient.generate`."""
        if request.request_id in self._streams:
            raise InvalidRequestError(f"request id {request.request_id} is in use", "request_id")
        stream = _Stream(request)
        self._send(stream)
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
            self._sent.pop(stream.sent_id, None)
            self._stop_timer(stream)
            if stream.open_choices and stream.place is not None:
                stream.place.abort_request(stream.sent_id, None)
            if stream is self._probation:
                self._end_probation()

    def abort(self, request_id: str, choice: int | None) -> None:
        """End one choice of a request with "abort", or all. Unknown ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is None:
            return
        choices = stream.open_choices.copy() if choice is None else {choice}
        if stream.place is None:
            stream.end(choices, finish_reason="abort")
        else:
            stream.aborted |= choices
            stream.place.abort_request(stream.sent_id, choice)

    # --- the engine's side

    def deliver(self, outputs: Iterable[SequenceOutput]) -> None:
        """Hand out a step's outputs, dropping those of streams that have been closed or moved."""
        sent = self._sent
        for output in outputs:
            stream = sent.get(output.request_id)
            if stream is not None:
                stream.take(output)
                if stream is self._probation:
                    stream.deaths -= 1
                    self._end_probation()

    def begun(self, request_ids: Iterable[str]) -> None:
        """Note that the engine begins to compute these requests."""
        for request_id in request_ids:
            stream = self._sent.get(request_id)
            if stream is not None:
                stream.runs = True
                if stream.scheduled is None:
                    stream.scheduled = time.monotonic() - stream.request.arrival_time

    def reject(self, request_id: str, error: QuireError) -> None:
        """Make the request's `generate` raise `error`, with which the engine refused it. A request
        that moved there after it had delivered something ends with `engine_dead`."""
        stream = self._sent.get(request_id)
        if stream is None:
            return
        if stream.has_delivered:
            text = f"the engine that was to go on with the request refused it: {error.message}"
            stream.fail(EngineDeadError(text))
        else:
            stream.open_choices.clear()
            stream.put(error)
        if stream is self._probation:
            self._end_probation()

    # --- moves

    def suspect_all(self, place: Place) -> None:
        """Count all streams of this engine as being computed: it has lost one of them."""
        self.begun(key for key, stream in self._sent.items() if stream.place is place)

    def detach(self, place: Place) -> None:
        """Send the streams of an engine that has died elsewhere; if nobody can take them now, they
        wait for `resume`."""
        lost = [stream for stream in self._sent.values() if stream.place is place]
        for stream in lost:
            if stream.open_choices:
                self._detach(stream)
        self.resume()

    def resume(self) -> None:
        """Send the streams that wait to an engine, in the order of their arrival, as far as there
        is one for them."""
        waiting = [
            stream
            for stream in self._streams.values()
            if stream.place is None and stream.open_choices
        ]
        for stream in sorted(waiting, key=lambda stream: stream.request.arrival_time):
            if stream.deaths >= MAX_DEATHS and self._probation is not None:
                continue
            try:
                self._send(stream)
            except EngineNotReadyError:
                continue

    def fail_all(self, error: QuireError, place: Place | None = None) -> None:
        """End every open choice with finish_reason "error"; with `place`, only those of streams
        that this engine has."""
        for stream in self._streams.values():
            if place is None or stream.place is place:
                stream.fail(error)

    def _send(self, stream: _Stream) -> None:
        """Send a stream's request, from where it stands. Raises EngineNotReadyError."""
        began_at = stream.info if stream.moves and stream.has_delivered else None
        request = stream.continuation()
        place = self._choose(request, began_at)
        info = place.info
        if began_at is not None:
            ours, theirs = (Fingerprint.of(one, request.adapter) for one in (began_at, info))
            if (difference := ours.difference(theirs)) is not None:
                text = f"the engine died, and no other can go on with the request: {difference}"
                stream.fail(EngineDeadError(text))
                return
        place.add_request(request)
        stream.place, stream.info, stream.runs = place, info, False
        if stream.deaths >= MAX_DEATHS:
            self._probation = stream
        self._sent[stream.sent_id] = stream
        self._stop_timer(stream)

    def _detach(self, stream: _Stream) -> None:
        # 1. It is at no engine any more, and will have another id at the next.
        del self._sent[stream.sent_id]
        if stream is self._probation:
            self._probation = None
        stream.place = None
        stream.moves += 1
        stream.deaths += stream.runs
        # 2. What its reader has given up ends here, as the engine would have ended it.
        stream.end(stream.aborted, finish_reason="abort")
        # 3. What cannot go on, or had better not.
        request_id, params = stream.request.request_id, stream.request.sampling_params
        if stream.deaths > MAX_DEATHS or stream.moves > MAX_MOVES:
            logger.error("request %s was on %d engines that died", request_id, stream.moves)
            text = f"the engine died {stream.moves} times while it served request {request_id}"
            stream.fail(EngineDeadError(text))
        elif params.beam_width is not None and stream.has_delivered:
            stream.fail(EngineDeadError("the engine died while it served the request"))
        # 4. The others wait, but not for ever.
        elif stream.open_choices:
            now = time.monotonic()
            limit = stream.limit(now)
            if limit is not None:
                until, error = limit
                loop = asyncio.get_running_loop()
                stream.timer = loop.call_later(max(0.0, until - now), stream.fail, error)

    def _end_probation(self) -> None:
        self._probation = None
        self.resume()

    def _stop_timer(self, stream: _Stream) -> None:
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None
