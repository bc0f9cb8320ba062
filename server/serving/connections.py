"""As many connections as there are descriptors for, and room for probes whatever clients do.

    ├─ in use ─┤├──────── connections ────────┤├─ probes ─┤├─ reserve: files, workers ─┤
    0                                        most                          the limit

A new connection that finds no place takes that of one that waits for its client: first of one that
has never shown a key, the oldest first. If none waits, the new one may still ask the probes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from ...engine.errors import QueueFullError
from ..errors import error_response
from ..http.http_protocol import GuardedH11Protocol
from .system_limits import PROBE_CONNECTIONS

PROBES = frozenset({"/live", "/health", "/ready", "/ping", "/load", "/version", "/metrics"})
"""Paths that are answered on them."""
_BATCH = 64  # one in so many connections is closed at once, so that the search is rarely made


class Connections:
    """The open connections of one process, the oldest first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: dict[BoundedProtocol, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: BoundedProtocol) -> None:
        """Take in a connection, in the place of others if there is none left."""
        self._open[connection] = None
        if len(self._open) <= self._most:
            return
        closed = 0
        for other in self._waiting(connection):
            other.transport.abort()
            self.remove(other)
            closed += 1
            if closed > self._most // _BATCH:
                return
        if closed:
            return
        if len(self._open) > self._most + PROBE_CONNECTIONS:
            connection.transport.abort()
        else:
            connection.serve_probes_only()

    def remove(self, connection: BoundedProtocol) -> None:
        """Forget a connection that is closed. Idempotent."""
        self._open.pop(connection, None)

    def _waiting(self, new: BoundedProtocol) -> Iterator[BoundedProtocol]:
        """Yield the connections other than `new` that wait for a request, in the order in which
        they are given up."""
        waiting = [one for one in self._open if one is not new and one.is_waiting]
        yield from (one for one in waiting if not one.has_shown_key)
        yield from (one for one in waiting if one.has_shown_key)


class BoundedProtocol(GuardedH11Protocol):
    """A connection that is one of `all_open`, an attribute of the class that serves."""

    all_open: Connections
    has_shown_key = False
    """Whether a request on it had a valid key."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.all_open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.all_open.remove(self)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        caller = self.scope.get("state", {}).get("caller")
        if caller is not None and caller.tenant.digests:
            self.has_shown_key = True
        super().on_response_complete()

    @property
    def is_waiting(self) -> bool:
        """Whether no request is being served on it."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def serve_probes_only(self) -> None:
        """Answer nothing but probes, since there are too many connections."""
        self.app_state = {**self.app_state, "probes_only": True}


class ProbesOnlyMiddleware:
    """Answers 429 to requests on connections that only probes are served on."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        probes_only = scope["type"] == "http" and scope.get("state", {}).get("probes_only")
        if probes_only and scope["path"].removeprefix(self.root_path) not in PROBES:
            response = error_response(QueueFullError("too many connections are open"), scope=scope)
            response.headers["connection"] = "close"
            return await response(scope, receive, send)
        await self.app(scope, receive, send)
