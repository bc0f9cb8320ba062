"""Test evicted blocks under the scheduler: what goes to the tier, what comes back, and when.

The fake worker reads every K/V back, so that each test would notice foreign or missing content.
"""

from __future__ import annotations

from typing import Any

import pytest

from quire.engine.cache.block_hashes import HASH_BYTES, prompt_hashes
from quire.engine.events.block_events import BlocksCleared, BlocksRemoved, BlocksStored
from quire.engine.lora import AdapterSource
from quire.engine.outputs import RowError
from quire.engine.scheduling.adapter_table import AdapterTable
from quire.engine.tiers import lower_tier
from quire.engine.tiers.block_store import BlockStore
from quire.engine.tiers.readmission import DEFAULT_WAIT

from ..harness import Harness, expected_tokens, prompt
from .stores import FaultyStore, Tasks

SIZE = 16


def harness(host_slots: int = 64, num_blocks: int = 8, **options: Any) -> Harness:
    """Return a harness whose pool holds one conversation, and no second one beside it."""
    return Harness(num_blocks=num_blocks, host_slots=host_slots, **options)


def complete(made: Harness, token_ids: list[int], max_tokens: int = 4, **fields: Any) -> int:
    """Run a request by itself, check its tokens, and return how many of its prompt were cached."""
    request = made.add(token_ids, max_tokens, **fields)
    made.run()
    params = request.sampling_params
    for choice in range(params.n):
        final = made.finals[request.request_id, choice]
        assert final.finish_reason == "length", final
        tokens = made.tokens[request.request_id, choice]
        assert tokens == expected_tokens(token_ids, choice, max_tokens)
    cached = made.finals[request.request_id, 0].num_cached_tokens
    assert cached is not None
    return cached


def counts(made: Harness, tier: int = 0) -> tuple[int, int, int]:
    one = made.scheduler.stats().tiers[tier]
    return one.stored, one.loaded, one.dropped


FIRST, SECOND = prompt(100), prompt(100, first=5000)


@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize("run_ahead", [False, True])
def test_an_evicted_conversation_comes_back(run_ahead: bool, lag: int) -> None:
    made = harness(run_ahead=run_ahead)
    made.worker.lag = lag
    assert complete(made, FIRST) == 0
    assert complete(made, SECOND) == 0
    stored, loaded, _ = counts(made)
    assert stored >= 4 and loaded == 0
    assert complete(made, FIRST) == 96
    assert counts(made)[1] >= 4
    made.assert_all_free()


OTHERS = (FIRST, SECOND, prompt(100, first=9000), prompt(100, first=13000))
GROUPED: dict[str, tuple[int | None, ...]] = {
    "window": (None, 20),
    "chunks": (None, -48, 20),
    "window only": (33,),
}


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("kind", GROUPED)
def test_blocks_of_all_groups_come_back(kind: str, run_ahead: bool) -> None:
    """What a match takes is loaded: all blocks of a full group, and the last ones of a window."""
    windows = GROUPED[kind]
    made = harness(num_blocks=13 * len(windows), windows=windows, run_ahead=run_ahead)
    for token_ids in OTHERS:
        assert complete(made, token_ids) == 0
    loaded = counts(made)[1]
    assert complete(made, FIRST) == 96
    # Six blocks of the full group, two of each window, and none of chunks that begin at token 96.
    blocks = {"window": 6 + 2, "chunks": 6 + 2, "window only": 2}[kind]
    assert counts(made)[1] - loaded == blocks
    made.assert_all_free()


def test_without_what_a_window_needs_a_full_group_brings_nothing_back() -> None:
    made = harness(num_blocks=26, windows=(None, 20))
    complete(made, FIRST)
    complete(made, SECOND)
    assert made.tier is not None
    for own_hash in made.tier.hashes():
        if len(own_hash) > HASH_BYTES:
            made.tier.discard([own_hash])
    made.manager.pool.forget_free()
    assert complete(made, FIRST) == 0 and counts(made)[1] == 0


def test_blocks_of_all_groups_come_back_from_the_store_below() -> None:
    store, reads, writes = FaultyStore(), Tasks(), Tasks()
    below: dict[str, Any] = {"store": store, "read": reads, "write": writes}
    made = harness(40, num_blocks=26, windows=(None, -48), budget=32, **below)

    def run(token_ids: list[int]) -> int | None:
        request = made.add(token_ids)
        while (request.request_id, 0) not in made.finals:
            reads.run(1)
            writes.run()
            made.step()
        return made.finals[request.request_id, 0].num_cached_tokens

    for talk in range(1, 11):
        assert run(prompt(100, first=1000 * talk)) == 0
    assert {len(own_hash) for own_hash in store.records} == {HASH_BYTES, HASH_BYTES + 1}
    # Six blocks of the full group, and none of chunks that begin at token 96.
    assert run(FIRST) == 96 and counts(made, 1)[1] == 6


def test_poisoned_blocks_of_all_groups_are_forgotten() -> None:
    made = harness(num_blocks=26, windows=(None, 20))
    complete(made, FIRST)
    complete(made, SECOND)
    complete(made, prompt(100, first=9000))
    request = made.add(FIRST, 4)
    made.step()
    made.scheduler.block_manager.free(made.scheduler.running[0], poisoned=True)
    assert made.tier is not None
    hashes = {own_hash[:HASH_BYTES] for own_hash in made.tier.hashes()}
    assert hashes.isdisjoint(prompt_hashes(FIRST, SIZE)), request


def test_without_a_tier_it_does_not() -> None:
    made = Harness(num_blocks=8)
    complete(made, FIRST)
    complete(made, SECOND)
    assert complete(made, FIRST) < 48
    assert made.scheduler.stats().tiers == []


def test_nothing_is_stored_while_nothing_is_evicted() -> None:
    made = harness(num_blocks=64)
    for _ in range(2):
        complete(made, FIRST)
        complete(made, SECOND)
    assert counts(made) == (0, 0, 0)


def test_a_block_that_is_in_the_tier_is_not_stored_again() -> None:
    made = harness()
    for _ in range(3):
        complete(made, FIRST)
        complete(made, SECOND)
    stored, loaded, dropped = counts(made)
    assert stored <= 14 and loaded > 14 and dropped == 0


def test_the_least_recently_used_are_given_up() -> None:
    made = harness(host_slots=6)
    complete(made, FIRST)
    complete(made, SECOND)
    complete(made, prompt(100, first=9000))
    stored, _, dropped = counts(made)
    assert dropped > 0 and stored > 6
    assert complete(made, FIRST) < 96


def test_salts_stay_apart() -> None:
    made = harness()
    complete(made, FIRST, cache_salt="a")
    complete(made, SECOND)
    assert complete(made, FIRST, cache_salt="b") == 0
    complete(made, SECOND)
    assert complete(made, FIRST, cache_salt="a") == 96


def test_a_preempted_sequence_finds_its_blocks() -> None:
    """Both together need 14 blocks of 11, so one of them waits; its blocks are swapped out."""
    made = harness(num_blocks=11)
    requests = [made.add(token_ids, 60) for token_ids in (prompt(48), prompt(48, first=7000))]
    made.run()
    assert made.scheduler.stats().preemptions > 0
    assert counts(made)[1] > 0
    for request, token_ids in zip(requests, (prompt(48), prompt(48, first=7000)), strict=True):
        assert made.tokens[request.request_id, 0] == expected_tokens(token_ids, 0, 60)


def test_choices_share_what_came_back() -> None:
    made = harness(num_blocks=12)
    complete(made, FIRST)
    complete(made, prompt(170, first=5000))
    assert complete(made, FIRST, n=3) == 96


def test_prompts_that_must_be_computed_whole_take_nothing() -> None:
    made = harness()
    complete(made, FIRST)
    complete(made, SECOND)
    assert complete(made, FIRST, prompt_logprobs=1) == 0
    assert counts(made)[1] == 0


def test_copies_that_are_slower_than_computing_are_not_made() -> None:
    made = harness()
    assert made.tier is not None
    made.tier.cost.observe_step(1000, 1000 * 1e-9)  # a token takes a nanosecond
    complete(made, FIRST)
    complete(made, SECOND)
    stored, loaded, dropped = counts(made)
    assert (stored, loaded) == (0, 0) and dropped > 0


def test_loads_of_a_step_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = harness()
    complete(made, FIRST)
    complete(made, SECOND)
    monkeypatch.setattr("quire.engine.tiers.block_tier.MAX_LOADS", 2)
    request = made.add(FIRST)
    loads = []
    while made.loop.has_work:
        before = counts(made)[1]
        made.step()
        loads.append(counts(made)[1] - before)
    assert loads[:2] == [2, 2] and max(loads) == 2
    assert made.finals[request.request_id, 0].num_cached_tokens == 96


def test_a_reset_forgets_the_tier() -> None:
    store = FaultyStore()
    made = below(store)
    complete(made, FIRST)
    complete_others(made)
    assert made.tier is not None and store.records
    made.tier.clear()
    made.manager.pool.forget_free()
    assert complete(made, FIRST) == 0
    complete_others(made)
    assert complete(made, FIRST) == 96  # what was stored since is found


def test_poisoned_blocks_are_found_nowhere() -> None:
    store = FaultyStore()
    made = below(store)
    complete(made, FIRST)
    complete_others(made)
    bad = made.add(FIRST)
    made.worker.errors[bad.request_id] = RowError("non_finite_logits", "injected")
    made.run()
    assert made.finals[bad.request_id, 0].finish_reason == "error"
    complete_others(made)
    assert complete(made, FIRST) == 0


# -- the store below -------------------------------------------------------------------------


def below(store: BlockStore, **options: Any) -> Harness:
    """Return a harness with host memory for a few blocks over a store. A step evicts few blocks."""
    values = {"budget": SIZE, "read": Tasks(slow=False), "write": Tasks(slow=False)}
    return harness(32, store=store, **values | options)


def complete_others(made: Harness) -> None:
    """Let other conversations take the place of all others, on the device and in host memory."""
    for first in range(5000, 13_000, 1000):
        complete(made, prompt(100, first=first))


@pytest.mark.parametrize("run_ahead", [False, True])
def test_what_host_memory_gives_up_goes_below_and_comes_back(run_ahead: bool) -> None:
    made = below(FaultyStore(), run_ahead=run_ahead)
    complete(made, FIRST)
    complete_others(made)
    assert complete(made, FIRST) == 96
    written, read, _ = counts(made, 1)
    assert written > 20 and read == 6


def test_adapters_stay_apart() -> None:
    table = AdapterTable(2, 8)
    for name in ("one", "two"):
        table.add(AdapterSource(name, f"/{name}", version="1"))
    made = below(FaultyStore(), adapters=table)
    complete(made, FIRST, adapter="one")
    complete_others(made)
    assert complete(made, FIRST) == complete(made, FIRST, adapter="two") == 0
    complete_others(made)
    assert complete(made, FIRST, adapter="one") == 96


def test_the_store_outlives_the_engine() -> None:
    store = FaultyStore()
    made = below(store)
    complete(made, FIRST)
    complete_others(made)
    assert made.tier is not None
    made.tier.close()
    again = below(store)
    assert complete(again, FIRST) >= 64


@pytest.mark.parametrize("max_writes", [1, 2, 1000])
def test_the_end_writes_all_that_only_host_memory_has(
    max_writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store was busy until now, so that even the oldest blocks have not been written ahead."""
    monkeypatch.setattr(lower_tier, "MAX_WRITES", max_writes)
    store, write = FaultyStore(), Tasks()
    made = below(store, write=write)
    complete(made, FIRST)
    complete_others(made)
    assert made.tier is not None
    kept = set(made.tier.host.hashes())
    assert kept - store.records.keys()
    write.run()
    write.slow = False
    made.tier.close()
    assert kept <= store.records.keys()


def test_nothing_is_lost_when_each_step_evicts_a_large_part_of_host_memory() -> None:
    """A step evicts 6 blocks; host memory has 16 slots."""
    made = harness(16, store=FaultyStore(), read=Tasks(slow=False), write=Tasks(slow=False))
    complete(made, FIRST)  # how much a step evicts is known after the first
    complete(made, SECOND)
    dropped = counts(made)[2]
    others = [prompt(100, first=first) for first in range(6000, 12_000, 1000)]
    for other in others:
        complete(made, other)
    assert counts(made)[2] == dropped
    assert [complete(made, other) for other in others] == [96] * 6


def test_others_go_on_while_one_waits_for_the_store() -> None:
    read = Tasks()
    store = FaultyStore()
    made = below(store, read=read)
    complete(made, FIRST)
    complete_others(made)
    slow, quick = made.add(FIRST), made.add([1, 2, 3])
    for _ in range(20):
        made.step()
    assert (quick.request_id, 0) in made.finals and (slow.request_id, 0) not in made.finals
    for _ in range(20):
        read.run()
        made.step()
    assert made.finals[slow.request_id, 0].num_cached_tokens == 96


def test_a_store_that_is_too_slow_is_not_waited_for() -> None:
    made = below(FaultyStore(), read=Tasks())
    complete(made, FIRST)
    complete_others(made)
    request = made.add(FIRST)
    made.step()
    made.step()
    assert (request.request_id, 0) not in made.finals
    made.time += DEFAULT_WAIT
    made.run()
    assert made.tokens[request.request_id, 0] == expected_tokens(FIRST, 0, 4)


def test_an_abort_ends_the_waiting() -> None:
    read = Tasks()
    made = below(FaultyStore(), read=read)
    complete(made, FIRST)
    complete_others(made)
    request = made.add(FIRST)
    made.step()
    made.scheduler.abort_request(request.request_id)
    made.run()
    assert made.finals[request.request_id, 0].finish_reason == "abort"
    read.run()
    assert complete(made, FIRST) > 0


@pytest.mark.parametrize("fault", ["garbage", "a bit", "load finds nothing", "load raises"])
def test_a_block_that_cannot_be_loaded_is_computed(fault: str) -> None:
    store = FaultyStore()
    made = below(store)
    complete(made, FIRST)
    complete_others(made)
    store.chance = 1.0
    store._happens = lambda name: name == fault  # type: ignore[method-assign]
    cached = complete(made, FIRST)
    assert cached < 96 and store.num_loads > 0
    assert made.scheduler.stats().tiers[1].failures > 0
    store._happens = lambda name: False  # type: ignore[method-assign]
    complete_others(made)
    assert complete(made, FIRST) == 96  # it was stored anew


def test_records_of_another_model_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FaultyStore()
    made = below(store)
    complete(made, FIRST)
    complete_others(made)
    num_records = len(store.records)
    monkeypatch.setattr("tests.engine.harness.FINGERPRINT", b"g" * 32)
    other = below(store)
    assert complete(other, FIRST) == 0
    assert store.num_loads > 0 and len(store.records) < num_records  # and they are deleted


def test_a_store_that_takes_nothing_costs_only_its_blocks() -> None:
    store = FaultyStore()
    store._happens = lambda name: name == "store raises"  # type: ignore[method-assign]
    made = below(store)
    complete(made, FIRST)
    complete_others(made)
    host, disk = made.scheduler.stats().tiers
    assert host.dropped > 0 and disk.failures > 0 and not store.records


def test_writes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_tier, "MAX_WRITES", 2)
    write = Tasks()
    made = below(FaultyStore(), write=write)
    complete(made, FIRST)
    complete_others(made)
    assert made.tier is not None and made.tier.lower is not None
    assert made.tier.lower.num_writing <= 2
    assert counts(made)[2] > 0  # what did not get there in time is lost


# -- who follows the blocks ------------------------------------------------------------------


def test_events_say_what_the_engine_has_anywhere() -> None:
    store = FaultyStore(room=8)
    made = below(store)
    made.manager.record_blocks(True)
    known: set[bytes] = set()
    for first in (*range(1000, 9000, 1000), 1000, 5000, 2000, 12_000, 1000):
        complete(made, prompt(100, first=first))
        assert made.tier is not None
        made.tier.poll()
        for event in made.manager.take_block_events():
            match event:
                case BlocksStored():
                    known |= set(event.hashes)
                case BlocksRemoved(hashes):
                    assert known >= set(hashes)
                    known -= set(hashes)
                case BlocksCleared():
                    known.clear()
        assert known == set(made.manager.known_blocks())
    assert len(known) > 8  # more than the pool has
    made.tier.clear()
    made.manager.pool.forget_free()
    for event in made.manager.take_block_events():
        assert isinstance(event, BlocksRemoved | BlocksCleared)
    assert made.manager.known_blocks() == []
