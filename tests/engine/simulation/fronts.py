"""The processes that speak for clients: the main one, which supervises engines, and HTTP workers.

With one engine each has a client of its own, with several a FleetClient over all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from quire.engine.fleet.directory import AttachedEngines
from quire.engine.fleet.fleet_client import FleetClient
from quire.engine.process.attached_client import AttachedEngineClient
from quire.engine.process.process_client import ProcessEngineClient
from quire.engine.process.streams import StreamTable

from .engine import SimLink

Client = ProcessEngineClient | AttachedEngineClient | FleetClient
MakeEngine = Callable[[int, StreamTable | None], ProcessEngineClient]


class Front(Protocol):
    """A process with a client of the engines."""

    @property
    def client(self) -> Client: ...


class MainFront:
    """The main process. `engines` are the clients that supervise."""

    def __init__(self, num_engines: int, make: MakeEngine) -> None:
        self.engines: list[ProcessEngineClient] = []
        self._num_engines, self._make = num_engines, make
        self.client: ProcessEngineClient | FleetClient
        if num_engines == 1:
            self.client = make(0, None)
            self.engines.append(self.client)
        else:
            self.client = FleetClient(self, name="main")

    def connect(self, streams: StreamTable) -> dict[str, ProcessEngineClient]:
        """Make the engines, as a directory does for a FleetClient."""
        self.engines += [self._make(index, streams) for index in range(self._num_engines)]
        return {str(index): engine for index, engine in enumerate(self.engines)}


class WorkerFront:
    """An HTTP worker process, and the one that takes its place when it dies. `links` are those to
    each engine."""

    def __init__(self, number: int, num_engines: int) -> None:
        self._number, self._num_engines = number, num_engines
        self._incarnation = 0
        self.client = self._start()
        self.asking: set[Any] = set()
        """The tasks of its clients' requests."""

    def _start(self) -> Client:
        self._incarnation += 1
        self.name = f"worker {self._number} {self._incarnation}".encode()
        if self._num_engines == 1:
            client = AttachedEngineClient(self.name)
            self.links = [client]
            return client
        unobserved: Any = lambda _: None  # noqa: E731
        directory = AttachedEngines(self._num_engines, self.name, unobserved)
        fleet = FleetClient(directory, name=self.name.decode())
        self.links = directory.links
        return fleet

    def die(self) -> bytes:
        """Let the process die with the requests that it serves; return its name."""
        name = self.name
        for link in self.links:
            if isinstance(link._engine, SimLink):
                link._engine.close()
            if link._reader is not None:
                link._reader.cancel()
        for task in self.asking:
            task.cancel()
        self.asking = set()
        self.client = self._start()
        return name
