"""Test a front's engines that come, leave, die and differ: real engine processes with a fake core,
their owners, and a broadcast without Ray."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from quire.engine.config import EngineConfig
from quire.engine.errors import EngineDeadError, EngineNotReadyError, StartupError
from quire.engine.outputs import SequenceOutput
from quire.engine.process import process_client
from quire.engine.process.process_client import ProcessEngineClient
from quire.server.ray_app import engine_owner, serve_engines
from quire.server.ray_app.engine_owner import EngineOwner
from quire.server.ray_app.serve_engines import ServeEngines, ServeFleet

from ...engine import fakes
from ...engine.clients import Observer, collect, tokens_of
from ...engine.fakes import SLOW, expected_tokens, make_request


class Cluster:
    """Owners of engines, and fronts that ask them."""

    def __init__(self) -> None:
        self.owners: list[EngineOwner] = []
        self.all: list[EngineOwner] = []
        self.fronts: list[ServeFleet] = []
        self.trouble: list[object] = []
        """What is answered beside, or raised if it is the only answer."""
        self.versions: dict[str, str] = {}

    async def start_engine(
        self, model: str = "fake", version: str | None = None, **fields: int
    ) -> EngineOwner:
        make = partial(ProcessEngineClient, core="fakes:build_core", max_restarts=1)
        owner = EngineOwner(EngineConfig(model=model, **fields), "127.0.0.1", make)
        self.all.append(owner)
        await owner.start()
        if version is not None:
            self.versions[owner.name] = version
        self.owners.append(owner)
        return owner

    async def ask(self, client_key: str) -> Sequence[object]:
        if self.trouble and isinstance(self.trouble[0], OSError):
            raise self.trouble[0]
        described = [owner.describe(client_key) for owner in self.owners]
        changed = [
            one._replace(version=self.versions.get(one.name, one.version)) for one in described
        ]
        return [*changed, *self.trouble]

    async def start_front(self) -> ServeFleet:
        front = ServeFleet(ServeEngines(self.ask, "fake", lambda number: Observer()))
        self.fronts.append(front)
        await front.start()
        return front


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parent))
    monkeypatch.setattr(process_client, "FIRST_DELAY_SECONDS", 0.1)
    for module in (engine_owner, serve_engines):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    cluster = Cluster()
    yield cluster
    await asyncio.gather(*(front.close() for front in cluster.fronts))
    await asyncio.gather(*(owner.drain(0) for owner in cluster.all))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


Work = list[tuple[fakes.Request, asyncio.Task[list[SequenceOutput]]]]


def submit(front: ServeFleet, count: int, length: int) -> Work:
    requests = [make_request(SLOW, max_tokens=length) for _ in range(count)]
    return [(request, asyncio.create_task(collect(front, request))) for request in requests]


async def check(work: Work) -> None:
    for request, task in work:
        outputs = await asyncio.wait_for(task, 60)
        assert tokens_of(outputs) == expected_tokens(request)
        assert outputs[-1].finish_reason == "length"


async def test_engines_join_leave_and_die_under_streams(cluster: Cluster) -> None:
    # 1. Without engines a front lives and is not ready.
    front = await cluster.start_front()
    assert front.health().alive and not front.health().ready
    with pytest.raises(EngineNotReadyError, match="no engine has joined"):
        await collect(front, make_request())
    # 2. Engines join, for several fronts alike.
    one, two = await asyncio.gather(cluster.start_engine(), cluster.start_engine())
    other = await cluster.start_front()
    await asyncio.gather(front.wait_joined(), other.wait_joined())
    await until(lambda: all(len(each._joined) == 2 for each in cluster.fronts))
    work = submit(front, 4, 80) + submit(other, 4, 80)
    both = {one.name, two.name}
    await until(lambda: {front.engine_of(request.request_id) for request, _ in work[:4]} == both)
    # 3. One is killed, and comes back with another address and another key.
    before = one._client.endpoint
    assert one._client._engine is not None
    os.kill(one._client._engine.pid, signal.SIGKILL)
    await until(lambda: one._client.is_ready and one._client.endpoint != before)
    await until(lambda: all(len(each._joined) == 2 for each in cluster.fronts))
    await check(work)
    # 4. A front's death ends its requests at the engines.
    submit(other, 3, 10_000)
    await asyncio.sleep(0.2)
    await other.close()
    await until(
        lambda: (
            not any(
                (stats := owner._client.stats()) is None or stats.num_running
                for owner in cluster.owners
            )
        )
    )


async def test_draining_waits_and_then_moves(cluster: Cluster) -> None:
    one, two = await asyncio.gather(cluster.start_engine(), cluster.start_engine())
    front = await cluster.start_front()
    await until(lambda: len(front._joined) == 2)
    short, long = submit(front, 4, 40), submit(front, 6, 300)
    await until(lambda: any(front.engine_of(asked.request_id) == one.name for asked, _ in short))
    # 1. It gets no new work, finishes what is short, and moves the rest when its time is over.
    cluster.owners.remove(one)
    draining = asyncio.create_task(one.drain(4))
    await until(lambda: one.name not in front.members)
    late = submit(front, 3, 10)
    await asyncio.sleep(0.05)
    assert {front.engine_of(request.request_id) for request, _ in late} <= {two.name, None}
    await check(short)
    assert not draining.done()
    await draining
    await check(late + long)
    assert one._client.endpoint is None
    # 2. No request is suspected to have ended it, however often engines leave.
    assert front.health() == (True, True, "ready", 0)
    # 3. If all leave at once, they serve until their successors do.
    new = await cluster.start_engine()
    cluster.owners = [new]
    leaving = asyncio.create_task(two.drain(600))
    handovers = []
    while new.name not in front.joined or two.name in front.joined:
        handovers += submit(front, 1, 2)
        await asyncio.sleep(0.01)
    await check(handovers + submit(front, 1, 2))
    await leaving
    # 4. An idle one ends soon.
    three = await cluster.start_engine()
    await until(lambda: len(front._joined) == 2)
    cluster.owners.remove(three)
    await asyncio.wait_for(three.drain(600), 60)


async def test_trouble_with_asking_concludes_nothing(cluster: Cluster) -> None:
    one = await cluster.start_engine()
    front = await cluster.start_front()
    await front.wait_joined()
    work = submit(front, 2, 60)
    for trouble in (OSError("the controller is away"), EngineDeadError("an actor is dead")):
        cluster.trouble = [trouble]
        cluster.owners = []
        await asyncio.sleep(0.2)
        assert list(front.members) == [one.name] and front.health().ready
    await check(work)
    cluster.trouble = []
    # Even if no engine is listed, the one that serves does, until its link ends.
    await asyncio.sleep(0.2)
    await check(submit(front, 1, 5))
    await one.drain(0)
    await until(lambda: not front.members)
    assert front.health().alive and not front.health().ready


async def test_other_models_versions_and_fingerprints_are_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries: list[dict[str, str]] = []
    log = SimpleNamespace(
        info=lambda *_, **entry: None, warning=lambda _, **entry: entries.append(entry)
    )
    monkeypatch.setattr(serve_engines, "log", log)
    one = await cluster.start_engine()
    front = await cluster.start_front()
    await front.wait_joined()
    model, size, old = await asyncio.gather(
        cluster.start_engine("other"),
        cluster.start_engine(block_size=32),
        cluster.start_engine(version="0.0.1"),
    )
    await until(lambda: size.name in front.refused and len(entries) == 2)
    assert "block_size" in front.health().reason and front.health().ready
    assert front._joined == {one.name} and front.members.keys() == {one.name, size.name}
    logged = {entry["engine"]: entry["reason"] for entry in entries}
    assert logged[model.name] == "it serves other, and this front fake"
    assert logged[old.name].startswith("it is version 0.0.1")
    await check(submit(front, 6, 10))
    # When all that it knows have left, those that were unlike them take over.
    cluster.owners.remove(one)
    await until(lambda: front._joined == {size.name})
    assert front.info.block_size == 32 and not front.refused
    await check(submit(front, 2, 10))


async def test_an_engine_that_cannot_start_says_why(cluster: Cluster) -> None:
    with pytest.raises(StartupError, match="the weights are broken"):
        await cluster.start_engine("broken")


async def test_an_engine_that_is_given_up_needs_another_owner(cluster: Cluster) -> None:
    owner = await cluster.start_engine()
    owner.check()
    for _ in range(2):
        await until(lambda: owner._client.is_ready)
        assert owner._client._engine is not None
        os.kill(owner._client._engine.pid, signal.SIGKILL)
        await until(lambda: not owner._client.is_ready)
    await until(lambda: owner._client.has_failed)
    with pytest.raises(EngineDeadError, match="given up"):
        owner.check()
