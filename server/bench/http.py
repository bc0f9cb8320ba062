"""The HTTP client of `quire bench serve`: aiohttp, with a time stamp for each piece of an answer.

aiohttp belongs to the extra `bench`. docs/benchmarking.md says what the client costs and how late
its stamps are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp

from .stream import RequestError

Sink = Callable[[bytes, float], None]
"""Takes a piece of the body and the `time.perf_counter()` at which it was read."""


class HttpAnswer(NamedTuple):
    """The status of an answer, and the part of its body that did not go to a sink."""

    status: int
    body: bytes


class HttpClient:
    """Sends requests to one server, as many at once as there are callers.

    It is made within the event loop that uses it. `base_url` is http or https, with or without a
    path; any other raises ValueError.
    """

    def __init__(self, base_url: str, headers: dict[str, str]) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:
            raise ValueError(f"not an http or https URL: {base_url!r}")
        if "@" in url.netloc:
            raise ValueError("a URL with a password in it would be saved with the result")
        self._base = base_url.rstrip("/")
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_mark_reused)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers=headers,
            # A compressed stream would arrive in other pieces, at a cost to both sides.
            skip_auto_headers=("Accept-Encoding",),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            trace_configs=[trace],
        )

    async def request(
        self, method: str, path: str, body: bytes = b"", sink: Sink | None = None
    ) -> HttpAnswer:
        """Send one request and return its answer.

        The body of a 200 goes to `sink`, if there is one, as it arrives. Raises RequestError of the
        kind connection_failed, connection_lost or bad_http, and what the sink raises.
        """
        while True:
            connection = SimpleNamespace(reused=False, answered=False)
            try:
                async with self._session.request(
                    method,
                    self._base + path,
                    data=body,
                    allow_redirects=False,
                    trace_request_ctx=connection,
                ) as response:
                    connection.answered = True
                    if sink is None or response.status != 200:
                        return HttpAnswer(response.status, await response.read())
                    read = response.content.readany
                    while data := await read():
                        sink(data, time.perf_counter())
                    return HttpAnswer(response.status, b"")
            except aiohttp.ClientConnectorError as error:
                where = f"cannot connect to {error.host}:{error.port}"
                reason = error.os_error.strerror or error.os_error
                raise RequestError("connection_failed", f"{where}: {reason}") from error
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
                # The server may have closed an idle connection while we wrote to it.
                if connection.reused and not connection.answered:
                    continue
                raise RequestError("connection_lost", str(error)) from error
            except aiohttp.ClientResponseError as error:
                raise RequestError("bad_http", str(error)) from error

    async def close(self) -> None:
        """Close the idle connections."""
        await self._session.close()


async def _mark_reused(
    session: aiohttp.ClientSession,
    context: SimpleNamespace,
    params: aiohttp.TraceConnectionReuseconnParams,
) -> None:
    context.trace_request_ctx.reused = True
