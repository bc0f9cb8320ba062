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
from collections.abc import AsyncGenerator, Callable, Iterable

from ..client import Fingerprint
from ..config import EngineInfo
from ..errors import EngineDeadError, EngineNotReadyError, InvalidRequestError, QuireError
from ..outputs import SequenceOutput
from ..request import Request
from .stream import MAX_DEATHS, Place, Stream

MAX_MOVES = 4
"""Moves of a request from engines that died, those that had not begun it included: an engine may
die before it can say that it has begun a request."""

Choose = Callable[[Request, EngineInfo | None], tuple[Place, Request]]
"""Returns the engine for a request, and the request as it is to be sent there, or raises
EngineNotReadyError. It is also given the facts about the engine that began the request, or None for
a request that has delivered nothing."""

logger = logging.getLogger("quire.engine.client")


class StreamTable:
    """Distribute the outputs of each step to the streams of their requests. For one event loop."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self._streams: dict[str, Stream] = {}
        """All open streams, by their request's id."""
        self._sent: dict[str, Stream] = {}
        """Those that an engine has, by the id that the request has there."""

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
        stream = Stream(request)
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

    def place_of(self, request_id: str) -> Place | None:
        """Return the engine that has an open request."""
        stream = self._streams.get(request_id)
        return None if stream is None else stream.place

    # --- the engine's side

    def deliver(self, outputs: Iterable[SequenceOutput]) -> None:
        """Hand out a step's outputs, dropping those of streams that have been closed or moved."""
        sent = self._sent
        for output in outputs:
            stream = sent.get(output.request_id)
            if stream is not None:
                stream.take(output)

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

    # --- moves

    def suspect_all(self, place: Place) -> None:
        """Count all streams of this engine as being computed: it has lost one of them."""
        self.begun(key for key, stream in self._sent.items() if stream.place is place)

    def detach(self, place: Place, *, is_death: bool = True) -> None:
        """Send the streams of an engine that has died elsewhere; if nobody can take them now, they
        wait for `resume`. If it was not its death, no request is suspected."""
        lost = [stream for stream in self._sent.values() if stream.place is place]
        for stream in lost:
            if stream.open_choices:
                self._detach(stream, is_death)
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

    def _send(self, stream: Stream) -> None:
        """Send a stream's request, from where it stands. Raises EngineNotReadyError."""
        began_at = stream.info if stream.moves and stream.has_delivered else None
        place, request = self._choose(stream.continuation(), began_at)
        info = place.info
        if began_at is not None:
            ours, theirs = (Fingerprint.of(one, request.adapter) for one in (began_at, info))
            if (difference := ours.difference(theirs)) is not None:
                text = f"the engine died, and no other can go on with the request: {difference}"
                stream.fail(EngineDeadError(text))
                return
        place.add_request(request)
        stream.place, stream.info, stream.runs = place, info, False
        self._sent[stream.sent_id] = stream
        self._stop_timer(stream)

    def _detach(self, stream: Stream, is_death: bool) -> None:
        # 1. It is at no engine any more, and will have another id at the next.
        del self._sent[stream.sent_id]
        stream.place = None
        stream.moves += 1
        stream.losses += is_death
        stream.deaths += is_death and stream.runs
        # 2. What its reader has given up ends here, as the engine would have ended it.
        stream.end(stream.aborted, finish_reason="abort")
        # 3. What cannot go on, or had better not.
        request_id, params = stream.request.request_id, stream.request.sampling_params
        if stream.deaths > MAX_DEATHS or stream.losses > MAX_MOVES:
            logger.error("request %s was on %d engines that died", request_id, stream.losses)
            text = f"the engine died {stream.losses} times while it served request {request_id}"
            stream.fail(EngineDeadError(text))
        elif params.beam_width is not None and stream.has_delivered:
            stream.fail(EngineDeadError("the engine died while it served the request"))
        # 4. The others wait, but not for ever.
        elif stream.open_choices:
            now = time.monotonic()
            limit = stream.limit(now)
            if limit is not None:
                until, error = limit
                if until <= now:  # while its engine hung, and another one may hang, too
                    stream.fail(error)
                    return
                loop = asyncio.get_running_loop()
                stream.timer = loop.call_later(until - now, stream.fail, error)

    def _stop_timer(self, stream: Stream) -> None:
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None
