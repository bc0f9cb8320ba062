"""A lean HTTP/1.1 client for benchmarks: asyncio's protocols and h11, connections kept alive.

The client shares its machine with the server under test, so that its cost a chunk matters more
than its features: 15 µs of CPU a chunk of a streamed answer, where httpx takes 53.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import h11

Sink = Callable[[bytes, float], None]
"""Takes a piece of the body and the `time.perf_counter()` at which it arrived."""


class ConnectionLost(Exception):
    """The connection ended before the answer did."""


class HttpAnswer(NamedTuple):
    """`body` holds what did not go to the sink: the whole body of any status but 200."""

    status: int
    body: bytes


class HttpClient:
    """Requests to one server, as many at once as there are callers.

    Raises OSError where it cannot connect, ConnectionLost where the answer is cut, and
    h11.RemoteProtocolError where it is no HTTP. `base_url` is http or https, with a path or none.
    """

    def __init__(self, base_url: str, headers: dict[str, str]) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"not an http or https URL: {base_url!r}")
        if "@" in url.netloc:
            raise ValueError("a URL with a password in it would be saved with the result")
        self._host, self._path = url.hostname, url.path.rstrip("/")
        self._ssl = ssl.create_default_context() if url.scheme == "https" else None
        self._port = url.port or (443 if self._ssl else 80)
        self._headers = [("host", url.netloc), *headers.items()]
        self._idle: list[_Connection] = []

    async def request(
        self, method: str, path: str, body: bytes = b"", sink: Sink | None = None
    ) -> HttpAnswer:
        """One request; the body of a 200 goes to the sink as it arrives, if there is one."""
        head = h11.Request(
            method=method,
            target=self._path + path,
            headers=[*self._headers, ("content-length", str(len(body)))],
        )
        while True:
            connection = await self._connect()
            reused = connection.used
            try:
                answer = await connection.exchange(head, body, sink)
            except ConnectionLost:
                # The server may have closed an idle connection as we wrote to it.
                if reused and not connection.answered:
                    continue
                raise
            except BaseException:
                connection.close()
                raise
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()
            return answer

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self._host, self._port, ssl=self._ssl
        )
        return connection


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.CLIENT)
        self._sink: Sink | None = None
        self._body = bytearray()
        self._status = 0
        self._done: asyncio.Future[None] | None = None
        self.open = self.used = self.answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self.open = True

    async def exchange(self, head: h11.Request, body: bytes, sink: Sink | None) -> HttpAnswer:
        self._sink, self._body, self._status = sink, bytearray(), 0
        self.used, self.answered = True, False
        self._done = asyncio.get_running_loop().create_future()
        parts = [self._h11.send(head), self._h11.send(h11.Data(data=body))]
        parts.append(self._h11.send(h11.EndOfMessage()))
        self._transport.write(b"".join(part for part in parts if part))
        await self._done
        return HttpAnswer(self._status, bytes(self._body))

    @property
    def reusable(self) -> bool:
        """After an exchange: readies it for the next one, where the server agreed to that."""
        if not self.open or self._h11.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
            return False
        self._h11.start_next_cycle()
        return True

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._done is None or self._done.done():
            self._transport.abort()  # nothing was asked
            return
        self.answered = True
        try:
            self._h11.receive_data(data)
            self._read_events(now)
        except Exception as error:  # of h11 or of the sink: the caller's, not the event loop's
            self._fail(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._done is None or self._done.done():
            return
        try:
            self._h11.receive_data(b"")  # an answer without a length ends here
            self._read_events(time.perf_counter())
        except h11.RemoteProtocolError:
            self._fail(ConnectionLost("the connection closed before the answer ended"))
        else:
            self._fail(ConnectionLost("the connection closed before an answer"))

    def _read_events(self, now: float) -> None:
        assert self._done is not None
        while True:
            event = self._h11.next_event()
            if isinstance(event, h11.Data):
                if self._sink is not None and self._status == 200:
                    self._sink(bytes(event.data), now)
                else:
                    self._body += event.data
            elif isinstance(event, h11.Response):
                self._status = event.status_code
            elif isinstance(event, h11.EndOfMessage):
                self._done.set_result(None)
                return
            elif (
                event is h11.NEED_DATA
                or event is h11.PAUSED
                or isinstance(event, h11.ConnectionClosed)
            ):
                return

    def _fail(self, error: Exception) -> None:
        self.open = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
            self._transport.abort()
