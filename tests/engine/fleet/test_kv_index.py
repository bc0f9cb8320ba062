"""Test which engines the index finds, how it hears of changes, and what it expects."""

from __future__ import annotations

import pytest

from quire.engine.events.block_events import BlockChanges, block_key
from quire.engine.fleet.kv_index import KVIndex

HASHES = [bytes([i]) * 32 for i in range(10)]


def keys(*numbers: int) -> bytes:
    return b"".join(block_key(HASHES[i]) for i in numbers)


def make_index(**blocks: list[int]) -> KVIndex:
    index = KVIndex(expected_seconds=1.0)
    for engine, numbers in blocks.items():
        index.add_engine(engine)
        index.reset(engine, 0, keys(*numbers))
    return index


def test_a_match_counts_the_first_blocks_without_a_gap() -> None:
    index = make_index(a=[0, 1, 2], b=[0, 2, 3], c=[1, 2], d=[])
    assert index.match(HASHES[:4], 0.0) == {"a": 3, "b": 1}
    assert index.match(HASHES[:2], 0.0) == {"a": 2, "b": 1}
    assert index.match(HASHES[1:3], 0.0) == {"a": 2, "c": 2}
    assert index.match([], 0.0) == {} and index.match(HASHES[7:], 0.0) == {}


def test_changes_arrive_in_order_and_a_gap_is_noticed() -> None:
    index = make_index(a=[0, 1], b=[0])
    assert index.apply("a", BlockChanges(1, False, keys(1), keys(5)))
    assert index.known("a") == {HASHES[0][:8], HASHES[5][:8]}
    assert index.apply("a", BlockChanges(1, False, keys(5), b""))  # a duplicate has no effect
    assert len(index.known("a")) == 2
    # 1. Number 2 is missing: the engine is asked once, and its answer includes what came meanwhile.
    assert not index.apply("a", BlockChanges(3, False, b"", keys(6)))
    assert index.apply("a", BlockChanges(4, False, b"", keys(7)))
    index.reset("a", 4, keys(0, 7))
    assert index.known("a") == {HASHES[0][:8], HASHES[7][:8]}
    assert index.apply("a", BlockChanges(4, False, keys(7), b""))
    assert index.apply("a", BlockChanges(5, True, b"", keys(8)))
    assert index.known("a") == {HASHES[8][:8]} and index.known("b") == {HASHES[0][:8]}


def test_engines_come_and_go() -> None:
    index = make_index(a=[0, 1], b=[0], c=[0, 1])
    index.remove_engine("b")
    assert index.match(HASHES, 0.0) == {"a": 2, "c": 2}
    index.add_engine("d")  # takes the bit of b, and none of its blocks
    assert index.match(HASHES, 0.0) == {"a": 2, "c": 2} and index.known("d") == set()
    assert index.apply("d", BlockChanges(7, False, b"", keys(0)))  # before its known blocks came
    assert index.known("d") == set()
    index.reset("d", 7, keys(0))
    assert index.match(HASHES, 0.0) == {"a": 2, "c": 2, "d": 1}
    for engine in ("a", "c", "d"):
        index.remove_engine(engine)
    assert len(index) == 0 and not index.engines


def test_a_routed_prompt_counts_as_cached_for_a_while() -> None:
    index = make_index(a=[0], b=[])
    index.expect("a", HASHES[:3], now=10.0)
    index.expect("b", HASHES[:2], now=10.5)
    assert index.match(HASHES, 10.9) == {"a": 3, "b": 2}
    assert index.match(HASHES, 11.0) == {"a": 1, "b": 2}
    index.expect("b", HASHES[:2], now=11.2)  # again, before the first has passed
    assert index.match(HASHES, 11.6) == {"a": 1, "b": 2}
    assert index.match(HASHES, 12.2) == {"a": 1}
    # What an engine has lost, it is not expected to hold any more.
    index.expect("b", HASHES[:2], now=13.0)
    index.apply("b", BlockChanges(1, False, keys(1), keys(0)))
    assert index.match(HASHES, 13.1) == {"a": 1, "b": 1}
    index.expect("b", HASHES[:2], now=13.1)
    index.remove_engine("b")
    assert index.match(HASHES, 13.1) == {"a": 1} and not index._expected


def test_cut_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="9 bytes are no keys"):
        make_index(a=[]).reset("a", 0, b"123456789")
