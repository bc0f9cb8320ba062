"""A front's directory: which engines there are now, and the links to them. It knows nothing of Ray.

    front ── describe(key) to all ──▶ owners of engines (through Ray, twice a second)
          ◀── where each engine is ──
          ════ requests, tokens ════▶ engines (tcp, CURVE; never through Ray)

An engine that is no longer listed is leaving: it gets no new requests if there is another, and its
link stays until its streams have ended or it has. If asking fails, nothing is concluded from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from uuid import uuid4

import structlog

from ...engine.errors import StartupError
from ...engine.fleet.directory import Observers
from ...engine.fleet.fleet_client import FleetClient
from ...engine.fleet.network_client import NetworkEngineClient
from ...engine.network.keys import KeyPair
from ...engine.process.remote_client import RemoteEngineClient
from ...engine.process.streams import StreamTable
from ..about import quire_version
from .engine_owner import POLL_SECONDS, Described

Ask = Callable[[str], Awaitable[Sequence[object]]]
"""Calls `describe` of all owners with a client's public key. Each result is a Described, or the
exception that came instead of it."""

log = structlog.get_logger(__name__)


class ServeEngines:
    """A Directory of engines that come and go. `observers` returns the observer of an engine by a
    number; a number is used again when its engine has gone."""

    def __init__(self, ask: Ask, model: str, observers: Observers) -> None:
        """`model` is the name or folder that the front has loaded, too."""
        self._ask = ask
        self._model = model
        self._observers = observers
        self._keys = KeyPair.make()
        self.name = uuid4().hex[:12]
        """The name of this front, unlike any other's."""
        self._streams: StreamTable
        self._links: dict[str, NetworkEngineClient] = {}
        self._numbers: dict[str, int] = {}
        self._logged: set[str] = set()

    def connect(self, streams: StreamTable) -> dict[str, RemoteEngineClient]:
        self._streams = streams
        return {}

    async def follow(self, fleet: FleetClient) -> None:
        """Keep the fleet's members those that are listed, until it is cancelled."""
        while True:
            try:
                results = await self._ask(self._keys.public)
            except Exception as error:  # the cluster's own trouble: the links do not need it
                reason = f"{type(error).__name__}: {error}"
                if reason not in self._logged:
                    self._logged.add(reason)
                    log.warning("engines_unknown", error=reason)
            else:
                self.update(fleet, results)
            await asyncio.sleep(POLL_SECONDS)

    def update(self, fleet: FleetClient, results: Sequence[object]) -> None:
        """Apply the answers of the engines' owners."""
        listed = {one.name: one for one in results if isinstance(one, Described)}
        for name, described in listed.items():
            if (reason := self._refusal(described)) is not None:
                if name not in self._logged:
                    self._logged.add(name)
                    log.warning("engine_refused", engine=name, reason=reason)
                continue
            if name not in self._links:
                self._links[name] = self._make(name)
            link = self._links[name]
            if name not in fleet.members or link.is_leaving:
                fleet.add(name, link)
            if described.endpoint is not None and not link.is_linked:
                link.connect(described.endpoint, described.restarts)
        if len(listed) < len(results):
            return  # an answer is missing, and it does not say whose
        leaving = [name for name in fleet.members if name not in listed]
        for name in leaving:
            self._links[name].is_leaving = True
        if not any(fleet.members[name].is_ready for name in fleet.members.keys() & listed.keys()):
            # Their successors are not linked yet: until they are, those that still serve go on.
            leaving = [name for name in leaving if name not in fleet.joined]
        for name in leaving:
            log.info("engine_leaves", engine=name)
            fleet.retire(name)
        for name in [name for name, link in self._links.items() if not link.is_linked]:
            if name not in fleet.members:
                del self._links[name], self._numbers[name]

    async def close(self) -> None:
        """Close all links, those to leaving engines included."""
        await asyncio.gather(*(link.close() for link in self._links.values()))

    def _make(self, name: str) -> NetworkEngineClient:
        used = set(self._numbers.values())
        number = next(number for number in range(len(used) + 1) if number not in used)
        self._numbers[name] = number
        observer = self._observers(str(number))
        return NetworkEngineClient(f"{self.name}-{name}", self._keys, observer, self._streams)

    def _refusal(self, described: Described) -> str | None:
        ours = quire_version()
        if described.version != ours:
            return f"it is version {described.version} of quire, and this front {ours}"
        if described.model != self._model:
            return f"it serves {described.model}, and this front {self._model}"
        return None


class ServeFleet(FleetClient):
    """The engine client of a front: a FleetClient whose members come and go."""

    def __init__(self, engines: ServeEngines) -> None:
        super().__init__(engines, name=engines.name)
        self._engines = engines
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to follow the engines, and return at once."""
        if self._following is None:
            self._following = asyncio.create_task(self._engines.follow(self), name="engines")

    async def wait_joined(self) -> None:
        """Wait until an engine serves. Raises StartupError if following them has failed."""
        while not self.health().ready:
            assert self._following is not None
            if self._following.done():
                raise StartupError(f"cannot follow the engines: {self._following.exception()}")
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            with suppress(asyncio.CancelledError):
                await self._following
        await super().close()
        await self._engines.close()
