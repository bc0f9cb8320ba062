"""Test how an engine tells its clients what happens to its blocks."""

from __future__ import annotations

from pathlib import Path

from quire.engine.cache.block_hashes import prompt_hashes
from quire.engine.cache.block_manager import BlockManager
from quire.engine.events.block_events import BlockEvent, block_key, split_keys
from quire.engine.events.block_feed import BlockFeed
from quire.engine.process import wire
from quire.engine.request import Request

from ..fleet.local_engine import Link, local_engine
from ..harness import make_request, prompt


def keys_of(tokens: list[int]) -> set[bytes]:
    return set(map(block_key, prompt_hashes(tokens, 16)))


def finish(link: Link, request: Request) -> list[wire.StepMessage]:
    """Send a request, and return the steps until its end."""
    link.send(wire.Add(request))
    steps = []
    while True:
        steps.append(link.receive_until(wire.StepMessage))
        if any(output.finish_reason for output in steps[-1].outputs):
            return steps


def test_a_client_that_asks_gets_all_blocks_and_then_the_changes(tmp_path: Path) -> None:
    with local_engine(tmp_path, num_blocks=8) as connect:
        watching, other = connect(), connect()
        assert all(step.blocks is None for step in finish(other, make_request(prompt(40), 3)))
        watching.send(wire.WatchBlocks())
        known = watching.receive_until(wire.BlocksKnown)
        assert known.sequence == 0 and set(split_keys(known.keys)) == keys_of(prompt(32))
        # 1. Another client's request is in the changes, which have consecutive numbers.
        assert all(step.blocks is None for step in finish(other, make_request(prompt(96, 5000), 3)))
        seen, removed, stored = [], set(), set()
        while not (stored == keys_of(prompt(96, 5000)) and removed):
            message = watching.receive_until(wire.StepMessage, wire.Heartbeat)
            if message.blocks is not None:
                seen.append(message.blocks.sequence)
                removed |= set(split_keys(message.blocks.removed))
                stored |= set(split_keys(message.blocks.stored))
        assert seen == list(range(1, len(seen) + 1))
        assert removed <= keys_of(prompt(32))
        # 2. A reset of an idle engine comes with its heartbeat.
        other.send(wire.ResetPrefixCache())
        while (message := watching.receive_until(wire.Heartbeat)).blocks is None:
            pass
        assert message.blocks == (len(seen) + 1, True, b"", b"")
        # 3. Who asks again starts from the present.
        watching.send(wire.WatchBlocks())
        assert watching.receive_until(wire.BlocksKnown) == wire.BlocksKnown(len(seen) + 1, b"")


def test_a_client_learns_which_of_its_requests_a_step_includes(tmp_path: Path) -> None:
    with local_engine(tmp_path) as connect:
        one, other = connect(), connect()
        too_long = make_request(prompt(5000), 1)
        one.send(wire.Add(too_long))
        steps = finish(one, make_request(prompt(20), 4))
        assert {step.num_added for step in steps} == {2}
        assert finish(other, make_request(prompt(20), 2))[-1].num_added == 1
        assert one.receive_until(wire.Heartbeat).num_added == 2


class RecordedManager(BlockManager):
    """A block manager that counts how often it is asked for its events."""

    asked = 0

    def take_block_events(self) -> list[BlockEvent]:
        self.asked += 1
        return super().take_block_events()


def test_blocks_are_recorded_only_while_somebody_follows() -> None:
    manager, sent = RecordedManager(8, 16), list[tuple[bytes, int, bytes]]()
    feed = BlockFeed(lambda *message: sent.append(message))
    feed.begin(manager)
    assert feed.take(manager) is None and manager.asked == 0
    for client in (b"one", b"two"):
        feed.watch(manager, client)
    assert sent == [(b"one", 0, b""), (b"two", 0, b"")] and feed.take(manager) is None
    assert manager.asked == 1 and manager.pool.index.recorder is not None
    for client in (b"stranger", b"one"):
        feed.forget(manager, client)
        assert manager.pool.index.recorder is not None
    feed.forget(manager, b"two")
    assert manager.pool.index.recorder is None
