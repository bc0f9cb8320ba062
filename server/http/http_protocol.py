"""uvicorn's h11 protocol with the guards that it lacks: slow senders, too many headers, our errors.

uvicorn itself limits only the size of the headers (`h11_max_incomplete_event_size`) and the idle
time between two requests of a connection. Behind a reverse proxy that limits the rest, these
guards are not needed.

It also tells clients that only stop sending from clients that leave. Both end their side of the
connection in the same way, so a client whose request is complete is sent interim responses (102)
until its answer begins: one that has left resets the connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from h11._writers import ChunkedWriter
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import http_error_response

MAX_HEADER_BYTES = 64 * 1024
"""Maximum size of a request's headers."""
MAX_HEADERS = 100
"""Maximum number of a request's headers."""
HEAD_SECONDS = 10.0
"""Maximum time for the headers, from the start of the connection or the first byte of a later
request."""
BODY_SECONDS = 20.0
"""How often the progress of a body is checked."""
MIN_BODY_BYTES = 16 * 1024
"""Minimum bytes of a body that must arrive in each span of BODY_SECONDS, unless it ends."""
MAX_EVENTS = 64
"""Maximum parts of a body that are parsed before other tasks get their turn: a millisecond."""
MAX_UNREAD_BYTES = 64 * 1024
"""Bytes of a body that wait for the application, beyond which no more is read."""
FREE_CHUNKS, MIN_CHUNK_BYTES = 4096, 64
"""A body may have this many chunks of any size; beyond that, one for each so many of its bytes."""
LINGER_BYTES, LINGER_SECONDS = 16 * 2**20, 5.0
"""How much more of a body is read and dropped after its request has been answered, and for how
long. Clients read an answer only once they have sent their body; after that, the connection is
closed."""
WRITE_SECONDS = 30.0
"""How often the progress of a client that reads too slowly is checked."""
MIN_WRITTEN_BYTES = 1024
"""Minimum bytes of an answer that must leave in each span of WRITE_SECONDS."""
PROBE_SECONDS = (0.05, 5.0)
"""First and longest time between two interim responses to a client that has stopped sending; each
is three times the one before."""


class _Connection(h11.Connection):
    """h11 with bounds on the work that the parts of a body make.

    It also has a fast path for what streams send most, one chunk of a chunked body: the state
    machine would only find that nothing changes, at a fifth of a streamed token's time.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self.events_left = MAX_EVENTS
        self.held_back = False
        """Whether `next_event` has kept something back, because no events were left."""
        self._num_chunks = self._num_bytes = 0

    def next_event(self) -> Any:
        """Do as h11 does, but ask for data if no events are left. Raises RemoteProtocolError, too,
        if the chunks of the body are too small."""
        if self.events_left <= 0:
            self.held_back = True
            return h11.NEED_DATA
        event = super().next_event()
        if type(event) is h11.Data:
            self.events_left -= 1
            self._num_chunks += event.chunk_start
            self._num_bytes += len(event.data)
            if self._num_chunks > FREE_CHUNKS + self._num_bytes // MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        elif type(event) is h11.Request:
            self._num_chunks = self._num_bytes = 0
        return event

    def send(self, event: Any) -> Any:
        if (
            type(event) is h11.Data
            and event.data
            and self.our_state is h11.SEND_BODY
            and type(self._writer) is ChunkedWriter
        ):
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)
        return super().send(event)


class _Flow(FlowControl):
    """uvicorn's flow control, by which the protocol can keep the application from reading on."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class GuardedH11Protocol(H11Protocol):
    """Closes connections that send their request too slowly, that go on sending after it was
    refused, or that do not read their answer."""

    conn: _Connection
    flow: _Flow
    head_seconds = HEAD_SECONDS
    body_seconds = BODY_SECONDS
    linger_bytes = LINGER_BYTES
    linger_seconds = LINGER_SECONDS
    write_seconds = WRITE_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Connection()
        self._timer: asyncio.TimerHandle | None = None
        self._timed_state: object = None
        self._body_bytes = 0
        self._lingers = False
        self._next_turn: asyncio.Handle | None = None
        self._eof_waits = False
        self._write_timer: asyncio.TimerHandle | None = None
        self._unwritten = 0
        self._input_ended = False
        self._probe_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._set_timer(h11.IDLE, self.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        for handle in (self._probe_timer, self._write_timer, self._next_turn):
            if handle is not None:
                handle.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection if the client waits for the answer to a complete request.

        TLS cannot be closed in one direction, so there the end of the input ends the connection.
        """
        if self._next_turn is not None:  # what has arrived is not parsed yet
            self._eof_waits = True
            return True
        if self._awaits_answer and self.transport.get_extra_info("ssl_object") is None:
            if not self._input_ended:
                self._input_ended = True
                self._probe(PROBE_SECONDS[0])
            return True
        return False

    @property
    def _awaits_answer(self) -> bool:
        """Whether there is a complete request that is not yet answered."""
        cycle = self.cycle
        return cycle is not None and not (cycle.more_body or cycle.response_complete)

    def on_response_complete(self) -> None:
        self._watch_writes()
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # answered before its body was read
            self._cancel_timer()
            self._set_timer(h11.SEND_BODY, self.linger_seconds)
            self._lingers = True
        if not self._input_ended or self.transport.is_closing():
            return
        if self._awaits_answer:  # the client had sent several requests before it stopped
            self._probe(PROBE_SECONDS[0])
        else:
            self.transport.close()

    def _probe(self, delay: float) -> None:
        """Send an interim response, and another one after `delay` seconds.

        A client that has left answers with a reset, by which a later write fails. The parts of an
        answer that has begun do the same, and HTTP/1.0 has no interim responses.
        """
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        if (
            self.cycle.response_started
            or self.scope["http_version"] != "1.1"
            or self.transport.is_closing()
        ):
            return
        interim = h11.InformationalResponse(status_code=102, headers=[], reason=b"Processing")
        self.transport.write(self.conn.send(interim) or b"")
        again = min(3 * delay, PROBE_SECONDS[1])
        self._probe_timer = self.loop.call_later(delay, self._probe, again)

    def data_received(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._next_turn is None:
            self.conn.events_left = MAX_EVENTS
        super().data_received(data)
        self._keep_time()

    def handle_events(self) -> None:
        """Handle what has arrived, as much as may be handled in one turn of the event loop."""
        super().handle_events()
        if self.conn.held_back and self._next_turn is None and not self.transport.is_closing():
            self.flow.held = True
            self.flow.pause_reading()
            self._next_turn = self.loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._next_turn = None
        self.conn.events_left, self.conn.held_back = MAX_EVENTS, False
        self.handle_events()
        if self._next_turn is not None or self.transport.is_closing():
            return
        self._keep_time()
        self.flow.held = False
        if self.cycle is None or len(self.cycle.body) <= MAX_UNREAD_BYTES:
            self.flow.resume_reading()
        if self._eof_waits:
            self._eof_waits = False
            if not self.eof_received():
                self.transport.close()

    def _keep_time(self) -> None:
        """Set the timer that belongs to the state of what is being received."""
        state = self.conn.their_state
        if self._lingers:
            if state is h11.SEND_BODY:
                if self._body_bytes > self.linger_bytes and not self.transport.is_closing():
                    self.transport.close()
                return
            self._lingers = False
            self._cancel_timer()
        if state is self._timed_state and self._timer is not None:
            return
        self._cancel_timer()
        if state is h11.IDLE and self.conn.trailing_data[0]:
            self._set_timer(state, self.head_seconds)
        elif state is h11.SEND_BODY:
            self._set_timer(state, self.body_seconds)

    def _set_timer(self, state: object, seconds: float) -> None:
        self._timed_state = state
        self._body_bytes = 0
        self._timer = self.loop.call_later(seconds, self._on_timer)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        receiving_body = self.conn.their_state is h11.SEND_BODY and not self._lingers
        # If reading is paused, the client is not to blame.
        if receiving_body and (self._body_bytes >= MIN_BODY_BYTES or self.flow.read_paused):
            self._set_timer(h11.SEND_BODY, self.body_seconds)
        elif not self.transport.is_closing():
            self.transport.close()

    # -- clients that do not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _watch_writes(self) -> None:
        """Abort the connection if what waits to be sent does not leave from now on."""
        if self._write_timer is not None:
            self._write_timer.cancel()
        self._unwritten = self.transport.get_write_buffer_size()
        if self._unwritten:
            self._write_timer = self.loop.call_later(self.write_seconds, self._on_write_timer)

    def _on_write_timer(self) -> None:
        left = self.transport.get_write_buffer_size()
        if self._unwritten - MIN_WRITTEN_BYTES < left <= self._unwritten:
            self.transport.abort()  # to close it would wait for the client
        else:
            self._watch_writes()

    def send_400_response(self, msg: str) -> None:
        """Answer 400 in the shape of all our errors; if the answer has begun, just close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not (
            self.cycle is not None and self.cycle.response_started
        ):
            response = http_error_response(400, msg)
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class HeaderCountMiddleware:
    """Answers 431 to a request with more than MAX_HEADERS headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and len(scope["headers"]) > MAX_HEADERS:
            response = http_error_response(431, f"more than {MAX_HEADERS} headers")
            response.headers["connection"] = "close"
            return await response(scope, receive, send)
        await self.app(scope, receive, send)
