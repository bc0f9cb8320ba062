"""One engine's process, as the actor that owns it sees it. It knows nothing of Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple
from uuid import uuid4

from ...engine.config import EngineConfig, EngineInfo
from ...engine.errors import EngineDeadError
from ...engine.network.keys import Endpoint
from ...engine.outputs import EngineStats
from ...engine.process import wire
from ...engine.process.process_client import ProcessEngineClient
from ..about import quire_version
from .policy import Load

POLL_SECONDS = 0.5
"""How often fronts ask which engines there are."""
QUIET_POLLS = 6
"""Polls for which an engine without work waits before it ends: by then, fronts know that it is
leaving, and have linked to its successor."""
SPEED_SHARE = 0.05
"""Weight of a step in the average speed."""


class Described(NamedTuple):
    """What an engine's owner tells fronts. `endpoint` is None while the engine does not serve."""

    name: str
    model: str
    version: str
    endpoint: Endpoint | None
    restarts: int


class LoadMeter:
    """Measures an engine's Load from its statistics. It observes an engine, and `clock` is in
    seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seats = 1
        self._stats: EngineStats | None = None
        self._at = 0.0
        self._speed = 0.0
        self._asked: tuple[float, int] | None = None

    def engine_ready(self, info: EngineInfo) -> None:
        """Take the number of sequences per step, and forget what the process before has said."""
        self._seats, self._stats, self._asked = info.max_num_seqs, None, None

    def engine_restarted(self) -> None:
        """Do nothing: `engine_ready` follows."""

    def observe_step(self, stats: EngineStats) -> None:
        """Take the statistics of a step, or of an idle engine."""
        now, last = self._clock(), self._stats
        if last is not None and last.waiting_tokens and stats.step == last.step + 1:
            tokens, seconds = max(stats.step_tokens - stats.num_running, 0), now - self._at
            if tokens and seconds > 0:
                speed = tokens / seconds
                share = SPEED_SHARE if self._speed else 1.0
                self._speed += share * (speed - self._speed)
        self._stats, self._at = stats, now

    def load(self) -> Load | None:
        """Return the load, or None before the first step; preemptions are those since the last
        call."""
        stats, now = self._stats, self._clock()
        if stats is None:
            return None
        rate = 0.0
        if self._asked is not None and now > self._asked[0]:
            rate = max(stats.preemptions - self._asked[1], 0) / (now - self._asked[0])
        self._asked = (now, stats.preemptions)
        seats = stats.num_running / self._seats
        return Load(float(stats.waiting_tokens), self._speed, stats.kv_usage, seats, rate)


class EngineOwner:
    """Starts an engine that serves other machines, restarts it if it dies, and drains it.

    `host` is the address of this machine at which fronts reach it. `make` makes its client, as
    ProcessEngineClient does.
    """

    def __init__(
        self, config: EngineConfig, host: str, make: Callable[..., ProcessEngineClient]
    ) -> None:
        self.name = uuid4().hex[:12]
        self._model = config.model
        self._meter = LoadMeter()
        host = f"[{host}]" if ":" in host else host
        self._client = make(config, observer=self._meter, listen=f"tcp://{host}:*")
        self._client.on_message = self._heard
        self._keys: set[str] = set()

    def _heard(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Ready):  # a new process knows none of the fronts
            for key in self._keys:
                self._client.send(wire.Admit(key))

    async def start(self) -> None:
        """Return when the engine serves. Raises StartupError."""
        await self._client.start()
        try:
            await self._client.wait_ready()
        except BaseException:
            await self._client.close()
            raise

    def describe(self, client_key: str) -> Described:
        """Let in the client with this public key, and return where the engine is."""
        client = self._client
        if client_key not in self._keys:
            self._keys.add(client_key)
            if client.is_ready:
                client.send(wire.Admit(client_key))
        endpoint = client.endpoint if client.is_ready else None
        restarts = client.health().restarts
        return Described(self.name, self._model, quire_version(), endpoint, restarts)

    def check(self) -> None:
        """Raise EngineDeadError if the engine will not serve again: then it needs another owner.
        A crash or a stall is none of the kind, since the engine is restarted here."""
        if self._client.has_failed:
            raise EngineDeadError("the engine has failed too often and was given up")

    def load(self) -> dict[str, float]:
        """Return the engine's load by the names of Load's fields; nothing before its first step."""
        load = self._meter.load()
        return {} if load is None else load._asdict()

    async def drain(self, seconds: float) -> None:
        """Let the engine finish what it has for at most so many seconds, then end it. What is not
        finished by then, its fronts send to other engines."""
        begin = time.monotonic()
        while (passed := time.monotonic() - begin) < seconds and self._client.is_ready:
            stats = self._client.stats()
            is_idle = stats is None or not stats.num_running + stats.num_waiting
            if is_idle and passed > QUIET_POLLS * POLL_SECONDS:
                break
            await asyncio.sleep(0.1)
        await self._client.close()
