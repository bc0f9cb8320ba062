"""Test when snapshots are taken, to whom they go, and that an unwatched engine takes none."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.outputs import LiveSnapshot
from quire.engine.process import live_feed, wire
from quire.engine.process.live_feed import LiveFeed
from quire.engine.process.live_views import LARGEST_SHARE, SHORTEST_INTERVAL, LiveViews
from quire.engine.process.process_client import ProcessEngineClient

from .. import fakes
from ..fakes import SLOW, FakeCore, make_request


class Core:
    """A core that counts its snapshots; each takes `cost` seconds of the clock."""

    def __init__(self) -> None:
        self.time, self.cost = 100.0, 0.0
        self.taken = self.ended = 0
        self.sent: list[bytes] = []
        self.work = 0.0
        self.views = LiveViews(
            lambda client, message: self.sent.append(client),
            lambda: self.time,
            lambda: self.work,
        )

    def snapshot(self) -> LiveSnapshot:
        self.taken += 1
        self.time += 10 * self.cost  # others have the core for nine tenths of it
        self.work += self.cost
        return FakeCore(EngineConfig(model="fake")).snapshot()

    def end_snapshots(self) -> None:
        self.ended += 1

    def run(self, seconds: float, step: float = 0.01) -> None:
        """Step for some time, as the engine's loop does."""
        end = self.time + seconds
        while self.time < end:
            self.time += step
            if self.views.watched:
                self.views.send_if_due(self)


def test_nothing_is_taken_while_nobody_watches() -> None:
    core = Core()
    core.run(5)
    assert (core.taken, core.ended) == (0, 0) and not core.views.watched


def test_at_most_five_snapshots_a_second_until_the_watch_ends() -> None:
    core = Core()
    core.views.watch(b"a", 2.0)
    core.run(10)
    assert 8 <= core.taken <= 2.0 / SHORTEST_INTERVAL + 1
    assert core.ended == 1 and not core.views.watched
    core.views.watch(b"a", 1.0)
    core.run(10)
    assert core.ended == 2


@pytest.mark.parametrize("cost", [0.0005, 0.003, 0.02])
def test_expensive_snapshots_become_rarer(cost: float) -> None:
    core = Core()
    core.cost = cost
    core.views.watch(b"a", 50.0)
    core.run(40)
    assert core.taken * cost <= 1.1 * max(LARGEST_SHARE * 40, cost)


def test_each_client_gets_those_of_its_own_watch() -> None:
    core = Core()
    core.views.watch(b"a", 1.0)
    core.views.watch(b"b", 3.0)
    core.views.watch(b"c", 3.0)
    core.run(0.5)
    core.views.forget(b"c")
    core.views.forget(b"never seen")
    core.run(5)
    counts = {client: core.sent.count(client) for client in set(core.sent)}
    assert counts[b"c"] < counts[b"a"] < counts[b"b"]


async def test_readers_ask_while_they_read_and_miss_what_they_do_not_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live_feed, "SILENCE_SECONDS", 0.02)
    asked: list[float] = []
    feed = LiveFeed(asked.append)
    view = FakeCore(EngineConfig(model="fake")).snapshot()
    feed.deliver(view)  # nobody reads
    async with aclosing(feed.snapshots()) as first:
        assert await anext(first) is None and len(asked) == 1
        for number in range(3):
            feed.deliver(view._replace(tokens_computed=number))
        newest = await anext(first)
        assert newest is not None and newest.tokens_computed == 2
        before = len(asked)
        await asyncio.sleep(0.03)
        assert await anext(first) is None
        assert len(asked) == before + 1 and set(asked) == {live_feed.WATCH_SECONDS}
    feed.deliver(view)
    await asyncio.sleep(0.03)
    assert len(asked) == before + 1


async def test_an_engine_process_sends_snapshots_to_those_who_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parent))
    client = ProcessEngineClient(EngineConfig(model="fake"), core="fakes:build_core")
    await client.start()
    await client.wait_ready()
    async with aclosing(client.snapshots()) as snapshots:
        idle = await anext(snapshots)
        assert idle is not None and idle.blocks.count(2) == 0
        async with aclosing(client.generate(make_request(SLOW, max_tokens=100))) as outputs:
            await anext(outputs)
            while (busy := await anext(snapshots)) is None or busy.blocks.count(2) == 0:
                pass
        assert busy.stats.num_running == busy.blocks.count(2) == 1
    await client.close()


def test_messages_survive_the_wire() -> None:
    view = wire.LiveView(FakeCore(EngineConfig(model="fake")).snapshot())
    assert wire.decode_from_engine(wire.encode(view)) == view
    assert wire.decode_to_engine(wire.encode(wire.Watch(3.0))) == wire.Watch(3.0)
