"""EngineClient over several engines that serve the same model.

    HTTP process ── FleetClient ── one table of streams ─┬─ link ── engine 0
                        │                                ├─ link ── engine 1
                      router                             └─ link ── engine 2

Each request goes to the engine that the router finds cheapest. If that engine dies or hangs, its
requests go on at others at once; the table of streams sees to it that nobody can tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import abc
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from itertools import zip_longest

from ..client import EngineHealth, EngineState, Fingerprint
from ..config import EngineInfo
from ..errors import EngineDeadError, EngineNotReadyError, QuireError
from ..lora import AdapterSource
from ..outputs import EngineStats, LiveSnapshot, SequenceOutput, summed_tiers
from ..process import wire
from ..process.process_client import ProcessEngineClient
from ..process.remote_client import RemoteEngineClient
from ..process.stream import Place
from ..process.streams import StreamTable
from ..request import Request
from .directory import Directory
from .fleet_router import FleetRouter

logger = logging.getLogger("quire.engine.client")

OnRouted = Callable[[int, int], None]
"""Is told of each request that begins how many cached tokens routing expected, and how many the
engine found."""


class FleetClient:
    """An `EngineClient` over the engines of a directory. For use on one event loop.

    `name` tells this client from the fleet's other clients: with a configured seed, each draws
    other seeds for the requests that have none.
    """

    def __init__(
        self, directory: Directory, *, name: str = "", on_routed: OnRouted | None = None
    ) -> None:
        self._name = name
        self._on_routed = on_routed
        self._predicted: dict[str, int] = {}
        """By request id, the cached tokens that routing expects, until the engine says how many it
        has found."""
        self._streams = StreamTable(self._choose)
        self._router = FleetRouter()
        self._seeds: random.Random | None = None
        self._joined: set[str] = set()
        self.refused: dict[str, str] = {}
        """Engines that serve and get no requests, because they are not like the others: by name,
        what is different."""
        self.members = dict(directory.connect(self._streams))
        """The links to the engines, by name."""
        for member_name, member in self.members.items():
            self._follow(member_name, member)

    def add(self, name: str, member: RemoteEngineClient) -> None:
        """Let an engine join, with a link that has the streams of the directory's table. One that
        had retired, or was about to, may come back."""
        member.is_leaving = False
        self.members[name] = member
        self._follow(name, member)
        if member.is_ready and name not in self._joined:
            self._join(name, member, member.info)

    def retire(self, name: str) -> None:
        """Send no more requests to an engine, and forget it. What it has begun it goes on with; if
        it ends before, the rest goes on elsewhere, and no request is suspected to have killed
        it."""
        member = self.members.pop(name)
        member.is_leaving = True
        self.refused.pop(name, None)
        self._leave(name)

    @property
    def joined(self) -> frozenset[str]:
        """The names of the engines that get requests."""
        return frozenset(self._joined)

    def _join(self, name: str, member: RemoteEngineClient, info: EngineInfo) -> None:
        self.refused.pop(name, None)
        difference = self._difference(info)
        if difference is not None:
            logger.error("engine %s is not like the others: %s", name, difference)
            self.refused[name] = difference
            return
        self._joined.add(name)
        member.send(self._router.join(name, info))

    def _difference(self, info: EngineInfo) -> str | None:
        """Return what keeps an engine from the same work as those that have joined."""
        for name in self._joined:
            return Fingerprint.of(self.members[name].info).difference(Fingerprint.of(info))
        return None

    def _leave(self, name: str) -> None:
        if name in self._joined:
            self._joined.discard(name)
            self._router.leave(name)
        if not self._joined:  # the refused are like each other, or the first of them counts
            for other in list(self.refused):
                member = self.members[other]
                if other != name and member.is_ready:
                    self._join(other, member, member.info)

    def _follow(self, name: str, member: RemoteEngineClient) -> None:
        def read(message: wire.FromEngine) -> None:
            if isinstance(message, wire.Ready):
                self._join(name, member, message.info)
            elif name in self._joined:
                answer = self._router.observe(name, message)
                if answer is not None:
                    member.send(answer)

        def lost() -> None:
            self.refused.pop(name, None)
            self._leave(name)

        member.on_message, member.on_lost = read, lost
        member.on_failed = self._fail_if_none_is_left

    # --- EngineClient

    @property
    def info(self) -> EngineInfo:
        """Facts about the engines, which are equal. Raises EngineNotReadyError until one has first
        started."""
        for member in self._ready() or self.members.values():
            with contextlib.suppress(EngineNotReadyError):
                return member.info
        raise EngineNotReadyError(self.health().reason)

    async def start(self) -> None:
        for member in self.members.values():
            await member.start()

    async def generate(self, request: Request) -> AsyncGenerator[SequenceOutput, None]:
        if self._seeds is None:
            seed = self.info.seed
            self._seeds = random.Random(None if seed is None else f"{seed} {self._name}")
        request = request.with_seed(self._seeds.getrandbits(63))
        async with contextlib.aclosing(self._streams.generate(request)) as outputs:
            try:
                async for output in outputs:
                    if output.num_cached_tokens is not None:
                        predicted = self._predicted.pop(request.request_id, None)
                        if predicted is not None and self._on_routed is not None:
                            self._on_routed(predicted, output.num_cached_tokens)
                    yield output
            finally:
                self._predicted.pop(request.request_id, None)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        self._streams.abort(request_id, choice)

    def engine_of(self, request_id: str) -> str | None:
        """Return the name of the engine that has an open request."""
        place = self._streams.place_of(request_id)
        return next((name for name, member in self.members.items() if member is place), None)

    def stats(self) -> EngineStats | None:
        """Return the sums of the engines' latest statistics, or None before the first."""
        known = [stats for member in self.members.values() if (stats := member.stats())]
        return summed(known) if known else None

    def snapshots(self, engine: str | None = None) -> AsyncGenerator[LiveSnapshot | None, None]:
        """Yield snapshots of an engine; by default of the first that serves."""
        members = self._ready() or list(self.members.values())
        if engine is not None:
            members = [self.members[engine]] if engine in self.members else []
        if not members:
            raise EngineNotReadyError(self.health().reason)
        return members[0].snapshots()

    def health(self) -> EngineHealth:
        """Return the health of all: the fleet is ready, and alive, if one engine is."""
        healths = {name: member.health() for name, member in self.members.items()}
        bad = [f"engine {name}: {one.reason}" for name, one in healths.items() if not one.ready]
        bad += [
            f"engine {name} is not like the others: {how}" for name, how in self.refused.items()
        ]
        if not healths:
            bad = ["no engine has joined"]
        return EngineHealth(
            not healths or any(one.alive for one in healths.values()),
            any(one.ready for name, one in healths.items() if name not in self.refused),
            "; ".join(bad) or "ready",
            sum(one.restarts for one in healths.values()),
        )

    def engines(self) -> dict[str, EngineState]:
        return {
            name: EngineState(member.health(), member.stats())
            for name, member in self.members.items()
        }

    async def reset_prefix_cache(self) -> None:
        """Forget every cached block, of all engines, that no sequence holds. One that is not ready
        has none."""
        ready = self._ready()
        if not ready:
            raise EngineNotReadyError(self.health().reason)
        await asyncio.gather(*(member.reset_prefix_cache() for member in ready))

    async def load_adapter(self, source: AdapterSource, *, replace: bool = False) -> None:
        """Load a LoRA adapter in all engines, which must be ready. If one refuses it, or dies, none
        has it; but those that had another version of it, which they have replaced, serve the new
        one rather than none."""
        members = self._all_ready()
        had = [any(one.name == source.name for one in member.info.adapters) for member in members]
        for index, member in enumerate(members):
            try:
                await member.load_adapter(source, replace=replace)
            except QuireError:
                for other, is_replaced in zip(members[:index], had, strict=False):
                    if not is_replaced and other.is_ready:
                        await other.unload_adapter(source.name)
                raise

    async def unload_adapter(self, name: str) -> None:
        """Unload a LoRA adapter in all engines, which must be ready."""
        for member in self._all_ready():
            await member.unload_adapter(name)

    async def close(self) -> None:
        self._streams.fail_all(EngineDeadError("the engine was stopped"))
        await asyncio.gather(*(member.close() for member in self.members.values()))

    # --- Supervision, for a process that started the engines

    @property
    def supervised(self) -> list[ProcessEngineClient]:
        """The engines that this process supervises."""
        return [one for one in self.members.values() if isinstance(one, ProcessEngineClient)]

    async def wait_ready(self) -> EngineInfo:
        """Wait until the first start of every engine has succeeded. Raises StartupError if one
        fails."""
        tasks = [asyncio.ensure_future(member.wait_ready()) for member in self.supervised]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return self.info

    async def wait_given_up(self) -> None:
        """Wait until no engine is started again any more."""
        await asyncio.gather(*(member.wait_given_up() for member in self.supervised))

    # ---

    def _ready(self) -> list[RemoteEngineClient]:
        return [member for member in self.members.values() if member.is_ready]

    def _all_ready(self) -> list[RemoteEngineClient]:
        if len(self._ready()) < len(self.members):
            raise EngineNotReadyError(f"not all engines are ready: {self.health().reason}")
        return self._ready()

    def _choose(self, request: Request, began_at: EngineInfo | None) -> tuple[Place, Request]:
        """Choose an engine for a request, one that is equal to that at which it began if there is
        one."""
        names = [name for name in self.members if name in self._joined and self._serves(name)]
        if not names:
            raise EngineNotReadyError(self.health().reason)
        if began_at is not None:
            wanted = Fingerprint.of(began_at, request.adapter)
            equal = [
                name
                for name in names
                if Fingerprint.of(self.members[name].info, request.adapter) == wanted
            ]
            names = equal or names
        version = ""
        if request.adapter is not None:
            versions = {name: self._version(name, request.adapter) for name in names}
            names = [name for name in names if versions[name]] or names
            version = versions[names[0]]
        now = time.monotonic()
        hashes = self._router.hashes(request, version)
        choice = self._router.choose(request, hashes, now, names)
        self._router.sent(request, hashes, choice, now)
        if began_at is None:
            self._predicted[request.request_id] = choice.predicted_cached_tokens
        request = replace(request, expected_cached_tokens=choice.predicted_cached_tokens)
        return self.members[choice.engine], request

    def _version(self, name: str, adapter: str) -> str:
        """Return the version of an adapter that an engine has loaded; empty if it has none."""
        loaded = self.members[name].info.adapters
        return next((source.version for source in loaded if source.name == adapter), "")

    def _serves(self, name: str) -> bool:
        return self.members[name].is_ready

    def _fail_if_none_is_left(self) -> None:
        """End the streams that wait for an engine if none will come."""
        if not any(member.health().alive for member in self.members.values()):
            self._streams.fail_all(
                EngineDeadError("the engines died while they served the request")
            )


def summed(all_stats: abc.Sequence[EngineStats]) -> EngineStats:
    """Return the sums of the numbers of several engines, and the names that any of them has."""
    total: dict[str, object] = {}
    for field in EngineStats._fields:
        values = [getattr(stats, field) for stats in all_stats]
        if field in ("running_adapters", "waiting_adapters", "held_adapters"):
            total[field] = sorted({name for names in values for name in names})
        elif field == "accepted_per_position":
            total[field] = tuple(sum(each) for each in zip_longest(*values, fillvalue=0))
        elif field == "tiers":
            total[field] = summed_tiers([stats.tiers for stats in all_stats])
        else:
            total[field] = sum(values)
    return EngineStats(**total)  # type: ignore[arg-type]
