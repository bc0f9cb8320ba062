"""Test which engine the router chooses, and that cached prefixes never cost much waiting."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.cache.block_hashes import prompt_hashes
from quire.engine.events.block_events import BlockChanges, block_key
from quire.engine.fleet.kv_index import KVIndex
from quire.engine.fleet.router import SLACK, Choice, EngineState, Router

SIZE = 16
PROMPT = list(range(320))
HASHES = prompt_hashes(PROMPT, SIZE)


def choose(
    states: dict[str, tuple[int, int, int]],
    cached: dict[str, int],
    hashes: list[bytes] = HASHES,
    num_tokens: int = 330,
    tie_key: bytes | None = None,
) -> Choice:
    """Choose among engines of these waiting tokens, sequences and free blocks, which have cached so
    many blocks of the prompt."""
    index = KVIndex()
    for engine in states:
        index.add_engine(engine)
        keys = b"".join(map(block_key, hashes[: cached.get(engine, 0)]))
        index.reset(engine, 0, keys)
    router = Router(index, SIZE, decode=10.0, eviction=0.25)
    engines = [EngineState(engine, *state) for engine, state in states.items()]
    return router.choose(hashes, num_tokens, engines, 0.0, tie_key)


IDLE = (0, 0, 1000)


@pytest.mark.parametrize(
    ("states", "cached", "expected"),
    [
        # The longest cached prefix, if nobody is busy.
        ({"a": IDLE, "b": IDLE, "c": IDLE}, {"a": 3, "b": 20, "c": 12}, ("b", 320)),
        # 200 tokens wait there, but 320 would have to be computed elsewhere.
        ({"a": IDLE, "b": (200, 0, 1000)}, {"b": 20}, ("b", 320)),
        # Waiting there for 400 is worse than computing 320 here.
        ({"a": IDLE, "b": (400, 0, 1000)}, {"b": 20}, ("a", 0)),
        # Nothing is cached anywhere: the shortest queue.
        ({"a": (500, 0, 1000), "b": (90, 0, 1000), "c": (700, 0, 1000)}, {}, ("b", 0)),
        # The same queue: the one that serves fewer.
        ({"a": (0, 30, 1000), "b": (0, 4, 1000)}, {}, ("b", 0)),
        ({"a": (0, 30, 1000), "b": (0, 4, 1000)}, {"a": 15}, ("b", 0)),
        ({"a": (0, 30, 1000), "b": (0, 4, 1000)}, {"a": 20}, ("a", 320)),
        # The same otherwise: the one where nobody's prefix is evicted.
        ({"a": (0, 0, 3), "b": IDLE}, {}, ("b", 0)),
        ({"a": (0, 0, 3), "b": IDLE}, {"a": 18}, ("a", 288)),
    ],
)
def test_choices(
    states: dict[str, tuple[int, int, int]], cached: dict[str, int], expected: tuple[str, int]
) -> None:
    assert choose(states, cached) == expected


def test_one_token_is_always_computed() -> None:
    assert choose({"a": IDLE}, {"a": 20}, num_tokens=320) == ("a", 319)


def test_ties_are_the_same_everywhere_and_spread() -> None:
    engines = {name: IDLE for name in "abcdefgh"}
    chosen = Counter()
    for first in range(400):
        hashes = prompt_hashes(range(first, first + 40), SIZE)
        choice = choose(engines, {}, hashes, 40)
        shuffled = dict(random.Random(first).sample(list(engines.items()), len(engines)))
        assert choose(shuffled, {}, hashes, 40) == choice
        chosen[choice.engine] += 1
        # Without another engine, only its own prompts move.
        fewer = {name: state for name, state in engines.items() if name != "c"}
        assert (choose(fewer, {}, hashes, 40) == choice) == (choice.engine != "c")
    assert len(chosen) == 8 and max(chosen.values()) < 2 * 400 / 8


def test_a_session_breaks_ties_but_not_more() -> None:
    engines = {name: IDLE for name in "abcdefgh"}
    sessions = {choose(engines, {}, tie_key=b"%d" % i).engine for i in range(60)}
    assert len(sessions) == 8
    assert {choose(engines, {"d": 20}, tie_key=b"%d" % i).engine for i in range(60)} == {"d"}


def test_prompts_shorter_than_a_block_are_routed() -> None:
    assert choose({"a": (50, 0, 9), "b": IDLE}, {}, [], 7) == ("b", 0)


class Arrival(NamedTuple):
    """A request that comes `gap` tokens' time after the last one: `shared` blocks of one of a few
    prefixes, and then blocks of its own."""

    gap: int
    prefix: int
    shared: int
    own: int


class SimulatedEngine:
    """An engine that computes one token a tick and keeps the last `capacity` blocks."""

    def __init__(self, capacity: int) -> None:
        self.free_at = 0
        self.capacity = capacity
        self.blocks: OrderedDict[bytes, None] = OrderedDict()

    def serve(self, now: int, hashes: list[bytes], num_tokens: int) -> tuple[int, BlockChanges]:
        """Queue a prompt; return how long its first token takes, and what happens to the blocks."""
        cached = 0
        while cached < len(hashes) and hashes[cached] in self.blocks:
            cached += 1
        self.free_at = max(self.free_at, now) + max(num_tokens - cached * SIZE, 1)
        before = set(self.blocks)
        for one in hashes:
            self.blocks[one] = None
            self.blocks.move_to_end(one)
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)
        gone, new = before - set(self.blocks), set(self.blocks) - before
        changes = BlockChanges(
            0, False, b"".join(map(block_key, gone)), b"".join(map(block_key, new))
        )
        return self.free_at - now, changes


def replay(
    arrivals: list[Arrival], num_engines: int, capacity: int, *, prefixes: bool
) -> list[int]:
    """Return each request's time to its first token, in ticks. Without `prefixes`, engines are
    chosen by their load alone, and nothing is cached."""
    engines = {f"e{i}": SimulatedEngine(capacity if prefixes else 0) for i in range(num_engines)}
    index = KVIndex()
    for engine in engines:
        index.add_engine(engine)
        index.reset(engine, 0, b"")
    router = Router(index, SIZE)
    now, waits, numbers = 0, [], Counter[str]()
    for number, arrival in enumerate(arrivals):
        now += arrival.gap
        start = [1000 * arrival.prefix + i for i in range(arrival.shared * SIZE)]
        tokens = start + [10**6 + 10**4 * number + i for i in range(arrival.own * SIZE)]
        hashes = prompt_hashes(tokens, SIZE)
        states = [
            EngineState(name, max(engine.free_at - now, 0), 0, 10**6)
            for name, engine in engines.items()
        ]
        chosen = router.choose(hashes if prefixes else [], len(tokens), states, 0.0).engine
        wait, changes = engines[chosen].serve(now, hashes, len(tokens))
        waits.append(wait)
        if prefixes:
            numbers[chosen] += 1
            index.apply(chosen, changes._replace(sequence=numbers[chosen]))
    return waits


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        gap=st.sampled_from([0, 0, 0, 5, 40, 300]),
        prefix=st.integers(0, 3),
        shared=st.integers(0, 12),
        own=st.integers(1, 6),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(arrivals=ARRIVALS, num_engines=st.integers(1, 5), capacity=st.sampled_from([0, 8, 40, 1000]))
def test_never_much_worse_than_by_load_alone(
    arrivals: list[Arrival], num_engines: int, capacity: int
) -> None:
    """Whatever comes, the longest wait exceeds the longest one without any affinity by at most two
    prompts and the slack, however stale or cold the caches are."""
    by_load = replay(arrivals, num_engines, capacity, prefixes=False)
    routed = replay(arrivals, num_engines, capacity, prefixes=True)
    longest = max((one.shared + one.own) * SIZE for one in arrivals)
    assert max(routed) <= (1 + SLACK) * max(by_load) + 2 * longest


def test_a_popular_prefix_is_shared_and_does_not_make_a_hot_spot() -> None:
    """Nine of ten requests have the same prefix of 640 tokens; one engine alone could not serve
    them."""
    rng = random.Random(3)
    arrivals = [
        Arrival(gap=45, prefix=0 if rng.random() < 0.9 else rng.randrange(1, 50), shared=40, own=3)
        for _ in range(400)
    ]
    routed = replay(arrivals, 4, 400, prefixes=True)
    by_load = replay(arrivals, 4, 400, prefixes=False)
    assert sorted(routed)[200] < 300 and max(routed) < 2000
    assert sorted(by_load)[200] > 3000  # 688 tokens each 45 ticks are too much for four engines
