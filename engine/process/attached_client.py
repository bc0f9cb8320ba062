"""EngineClient over an engine process that another process supervises."""

from __future__ import annotations

import asyncio
import logging
import random

from ..errors import EngineDeadError
from ..outputs import EngineStats
from .engine_handle import EngineLink
from .remote_client import EngineObserver, EngineStatus, RemoteEngineClient, State
from .streams import StreamTable

logger = logging.getLogger("quire.engine.client")


class AttachedEngineClient(RemoteEngineClient):
    """An `EngineClient` that follows what the engine's supervisor reports.

    `name` is unique among all clients that the engine ever has. The observer is notified only when
    the engine becomes ready; the supervisor's own client observes its steps.
    """

    def __init__(
        self,
        name: bytes,
        *,
        observer: EngineObserver | None = None,
        streams: StreamTable | None = None,
    ) -> None:
        super().__init__(observer, streams)
        self._name = name
        self._reader: asyncio.Task[None] | None = None
        self.broken = asyncio.Event()
        """Set if a bug ended the reader, so that the client no longer hears from the engine."""

    def follow(self, status: EngineStatus) -> None:
        """Apply a status from the supervisor; call it with every status, in order.

        Between two addresses the supervisor reports None. The client becomes READY only when the
        engine itself has answered at the address.
        """
        self._restarts = status.restarts
        if status.address is None:
            self._detach(status.state)
        elif self._engine is None:
            self._engine = EngineLink(status.address, self._name)
            self._reader = asyncio.create_task(self._read(self._engine), name="engine reader")

    def _make_seeds(self, seed: int | None) -> random.Random:
        return random.Random(None if seed is None else f"{seed} {self._name.decode()}")

    async def start(self) -> None:
        """Do nothing: the supervisor starts the engine."""

    async def close(self) -> None:
        self._detach(State.CLOSED)

    def _detach(self, state: State) -> None:
        self._state = state
        if state in (State.FAILED, State.CLOSED):
            how = "was stopped" if state is State.CLOSED else "died while it served the request"
            self._fail_open(EngineDeadError(f"the engine {how}"))
        else:
            self._lose_engine()
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _observe(self, stats: EngineStats) -> None:
        self._stats = stats

    async def _read(self, engine: EngineLink) -> None:
        try:
            while True:
                self._handle(await engine.receive())
        except Exception:
            logger.exception("the engine's client failed")
            self.broken.set()
