"""Test that whoever replays the recorded events knows exactly the blocks that can be found."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from quire.engine.cache.block_hashes import hash_block, prompt_hashes, root_hash
from quire.engine.events.block_events import (
    BlockChanges,
    BlockEvent,
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    block_key,
    split_keys,
)
from quire.engine.fleet.kv_index import KVIndex
from quire.engine.sequence import Rank, Sequence

from ..harness import Harness, make_request, prompt
from ..scheduling.test_properties import STEM, SchedulerMachine


def replay(known: set[bytes], events: list[BlockEvent]) -> None:
    """Apply the events one by one."""
    for event in events:
        match event:
            case BlocksStored(hashes):
                assert not known & set(hashes), "stored twice"
                known |= set(hashes)
            case BlocksRemoved(hashes):
                assert known >= set(hashes), "removed without having been stored"
                known -= set(hashes)
            case BlocksCleared():
                known.clear()


class FollowedMachine(SchedulerMachine):
    """The scheduler's machine, followed from a random moment on in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[bytes] = set()
        self.index = KVIndex()
        self.index.add_engine("a")
        self.sequence = 0
        self.follows = False

    @rule()
    def follow(self) -> None:
        """Begin to follow, or begin again as after a gap."""
        manager = self.harness.manager
        manager.record_blocks(True)
        self.follows = True
        keys = b"".join(map(block_key, manager.known_blocks()))
        self.index.reset("a", self.sequence, keys)  # what is recorded by now comes once more
        self._take()
        self.known = set(manager.known_blocks())

    @rule()
    def stop_following(self) -> None:
        self.harness.manager.record_blocks(False)
        self.follows = False

    @rule(shared=st.integers(0, 70), tail=st.lists(st.integers(10, 12), min_size=1, max_size=20))
    def ask(self, shared: int, tail: list[int]) -> None:
        """A router predicts as many full blocks as the block manager matches."""
        if not self.follows:
            return
        self._take()
        tokens = STEM[:shared] + tail
        sequence = Sequence(make_request(tokens), 0, 0, Rank(0, 0, 0), frozenset())
        match = self.harness.manager.match_prefix(sequence, len(tokens))
        found = self.index.match(prompt_hashes(tokens, 16), 0.0)
        assert found.get("a", 0) == len(match.blocks)

    def _take(self) -> None:
        events = self.harness.manager.take_block_events()
        replay(self.known, events)
        if events:
            self.sequence += 1
            assert self.index.apply("a", BlockChanges.of(self.sequence, events))

    @invariant()
    def knows_all(self) -> None:
        events = self.harness.manager.take_block_events()
        if not self.follows:
            assert events == []
            return
        replay(self.known, events)
        if events:
            self.sequence += 1
            changes = BlockChanges.of(self.sequence, events)
            assert not set(split_keys(changes.stored)) & set(split_keys(changes.removed))
            assert self.index.apply("a", changes)
        truth = self.harness.manager.known_blocks()
        assert self.known == set(truth)
        assert self.index.known("a") == set(map(block_key, truth))


TestFollowed = FollowedMachine.TestCase
TestFollowed.settings = settings(
    SchedulerMachine.TestCase.settings, max_examples=80, deadline=None, derandomize=True
)


def test_nothing_is_recorded_while_nobody_follows() -> None:
    harness = Harness()
    harness.add(prompt(64), 40)
    harness.run()
    assert harness.manager.known_blocks() and harness.manager.pool.index.recorder is None
    assert harness.manager.take_block_events() == []


def test_what_events_say() -> None:
    harness = Harness(num_blocks=6)
    manager = harness.manager
    manager.record_blocks(True)
    tokens = prompt(40)
    harness.add(tokens, 1, cache_salt="secret")
    harness.run()
    hashes = prompt_hashes(tokens, 16, "secret")
    (stored,) = manager.take_block_events()
    assert isinstance(stored, BlocksStored)
    assert stored == (hashes, None, tokens[:32], 16, None, stored.salt)
    assert stored.salt and "secret" not in stored.salt
    # A longer prompt continues the chain.
    tokens = prompt(80)
    harness.add(tokens, 1, cache_salt="secret")
    harness.run()
    more = prompt_hashes(tokens, 16, "secret")
    (stored,) = manager.take_block_events()
    assert stored[:3] == (more[2:], more[1], tokens[32:])
    # Others take the blocks of the end first.
    harness.add(prompt(48, first=5000), 1)
    harness.run()
    removed, stored = manager.take_block_events()
    assert removed == BlocksRemoved([more[-1], more[-2]][: len(removed[0])])
    assert isinstance(stored, BlocksStored) and stored.salt is None
    manager.pool.forget_free()
    assert manager.take_block_events() == [BlocksCleared()]
    assert manager.known_blocks() == []


def test_a_reset_leaves_what_sequences_hold() -> None:
    harness = Harness()
    manager = harness.manager
    manager.record_blocks(True)
    harness.add(prompt(32, first=7000), 1)
    harness.run()
    harness.add(prompt(40), 30)
    harness.step()
    harness.step()
    manager.take_block_events()
    manager.pool.forget_free()
    (event,) = manager.take_block_events()
    assert isinstance(event, BlocksRemoved)
    assert set(event.hashes) == set(prompt_hashes(prompt(32, first=7000), 16))


def test_changes_are_the_last_event_of_each_block() -> None:
    def stored(*names: bytes) -> BlocksStored:
        return BlocksStored([name * 32 for name in names], None, [], 16, None, None)

    def removed(*names: bytes) -> BlocksRemoved:
        return BlocksRemoved([name * 32 for name in names])

    events = [stored(b"a", b"b"), removed(b"a"), stored(b"c"), removed(b"c", b"d"), stored(b"d")]
    changes = BlockChanges.of(7, events)
    assert (changes.sequence, changes.cleared) == (7, False)
    assert set(split_keys(changes.stored)) == {b"b" * 8, b"d" * 8}
    assert set(split_keys(changes.removed)) == {b"a" * 8, b"c" * 8}
    changes = BlockChanges.of(8, [*events, BlocksCleared(), stored(b"e")])
    assert changes == (8, True, b"", b"e" * 8)


def test_the_hashes_of_a_prompt_are_the_same_for_ever() -> None:
    """Processes of different versions may run side by side, and agree only if nothing changes."""
    tokens = list(range(16))
    assert hash_block(root_hash(None), tokens).hex()[:16] == "9743bccd0ac54574"
    assert hash_block(root_hash("s"), tokens).hex()[:16] == "0243d23447af6925"
    assert prompt_hashes([*tokens, 1], 16) == [hash_block(root_hash(None), tokens)]
    assert prompt_hashes(tuple(tokens), 16, "s") == prompt_hashes(tokens, 16, "s")
