"""Test several clients of one engine process, one of which supervises it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.errors import EngineNotReadyError, InvalidRequestError
from quire.engine.process import process_client, wire
from quire.engine.process.attached_client import AttachedEngineClient
from quire.engine.process.process_client import ProcessEngineClient
from quire.engine.process.remote_client import EngineStatus
from quire.engine.process.streams import MAX_DEATHS

from .. import fakes
from ..clients import Observer, collect, tokens_of
from ..fakes import EXIT, LOSE, SLOW, expected_tokens, make_request
from .test_process_client import assert_engine_dead, until_ready


async def ready(*clients: AttachedEngineClient) -> None:
    async with asyncio.timeout(20):
        while not all(client.health().ready for client in clients):
            await asyncio.sleep(0.01)


class Trio:
    """The supervising client, and two clients to which it forwards the engine's status."""

    def __init__(self) -> None:
        self.supervisor = Observer()
        self.follower = Observer()
        self.main = ProcessEngineClient(
            EngineConfig(model="fake"),
            core="fakes:build_core",
            observer=self.supervisor,
            stall_timeout=0.6,
        )
        self.one = AttachedEngineClient(b"one-0", observer=self.follower)
        self.two = AttachedEngineClient(b"two-0")
        self.main.on_status = self._forward

    def _forward(self, status: EngineStatus) -> None:
        self.one.follow(status)
        self.two.follow(status)

    async def settle(self) -> None:
        await until_ready(self.main)
        await ready(self.one, self.two)


@pytest.fixture
async def trio(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Trio]:
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parent))
    monkeypatch.setattr(process_client, "FIRST_DELAY_SECONDS", 0.02)
    trio = Trio()
    with pytest.raises(EngineNotReadyError, match="starting"):
        await collect(trio.one, make_request())
    await trio.main.start()
    await trio.settle()
    yield trio
    await trio.main.close()
    for client in (trio.one, trio.two):
        assert client.health() == trio.main.health()
        await client.close()


async def test_each_client_gets_its_own_outputs_and_all_get_the_stats(trio: Trio) -> None:
    assert trio.one.info == trio.two.info == trio.main.info
    requests = [make_request(100 * i, max_tokens=20, n=2) for i in range(1, 10)]
    clients = [(trio.main, trio.one, trio.two)[i % 3] for i in range(len(requests))]
    outputs = await asyncio.gather(*map(collect, clients, requests))
    for request, answer in zip(requests, outputs, strict=True):
        for choice in range(2):
            assert tokens_of(answer, choice) == expected_tokens(request, choice)
    async with asyncio.timeout(2):
        while not trio.main.stats() == trio.one.stats() == trio.two.stats():
            await asyncio.sleep(0.01)
    assert len(trio.follower.infos) == 1 and trio.supervisor.stats and not trio.follower.stats


async def test_refusals_and_resets_reach_the_client_that_asked(trio: Trio) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await collect(trio.two, make_request(max_tokens=60_000))
    assert caught.value.param == "max_tokens"
    await asyncio.gather(*(client.reset_prefix_cache() for client in (trio.one, trio.two)))


async def test_requests_of_a_dead_client_are_aborted(trio: Trio) -> None:
    mine = asyncio.create_task(collect(trio.one, make_request(SLOW, max_tokens=100)))
    lost = [
        asyncio.create_task(collect(trio.two, make_request(SLOW, max_tokens=10_000, n=2)))
        for _ in range(3)
    ]
    await asyncio.sleep(0.2)
    stats = trio.one.stats()
    assert stats is not None and stats.num_running == 7
    trio.main.client_gone(b"two-0")
    await asyncio.sleep(0.2)
    stats = trio.one.stats()
    assert stats is not None and stats.num_running == 1
    # Messages that it still sends are dropped, even a second hello.
    for _ in range(2):
        late = asyncio.create_task(collect(trio.two, make_request(SLOW, max_tokens=5)))
        lost.append(late)
        assert trio.two._engine is not None
        trio.two._engine.send(wire.Hello(wire.PROTOCOL))
    assert len(tokens_of(await mine)) == 100
    assert not any(task.done() for task in lost)
    for task in lost:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    # Nothing is left of it that the watchdog could take for a stall.
    await asyncio.sleep(1.5)
    assert trio.main.health().restarts == 0


@pytest.mark.parametrize("fault", [EXIT, LOSE])
async def test_all_clients_follow_a_restart(trio: Trio, fault: int) -> None:
    request = make_request(SLOW, max_tokens=40)
    bystander = asyncio.create_task(collect(trio.two, request))
    await asyncio.sleep(0.1)
    outputs = await asyncio.wait_for(collect(trio.one, make_request(fault)), 20)
    assert_engine_dead(outputs)
    assert tokens_of(await bystander) == expected_tokens(request)
    await trio.settle()
    restarts = trio.main.health().restarts
    assert trio.one.health().restarts == restarts == MAX_DEATHS + 1
    request = make_request()
    assert tokens_of(await collect(trio.two, request)) == expected_tokens(request)
