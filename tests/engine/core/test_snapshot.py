"""Test that a snapshot shows what the block tables, the pool and the plans say."""

from __future__ import annotations

from collections import Counter

import pytest

from quire.engine.cache.block_pool import MAX_STATE, BlockPool
from quire.engine.core.snapshot import MAX_WAITING, take_snapshot
from quire.engine.outputs import LiveSnapshot
from quire.engine.sequence import SequenceStatus

from ..harness import Harness, prompt


def agree(harness: Harness) -> LiveSnapshot:
    """Take a snapshot, and compare it with the sequences, whose integrity is proven as well."""
    harness.check_integrity()
    pool, running = harness.manager.pool, harness.scheduler.running
    snapshot = take_snapshot(harness.scheduler)
    held = Counter(block for sequence in running for block in sequence.block_table)
    for block, state in enumerate(snapshot.blocks):
        is_kept = block in pool.index and not held[block]
        assert state == (held[block] + 1 if held[block] else int(is_kept)), block
    stats = snapshot.stats
    assert snapshot.blocks.count(0) + snapshot.blocks.count(1) == stats.num_free_blocks
    assert snapshot.blocks.count(1) == stats.num_cached_blocks
    shown = [one for one in snapshot.sequences if one.status == "running"]
    assert [one.seq_id for one in shown] == [one.seq_id for one in running]
    for one, sequence in zip(shown, running, strict=True):
        assert one.block_table == sequence.block_table
        assert one.num_computed_tokens == sequence.num_computed_tokens + sequence.num_in_flight
        assert one.num_tokens == len(sequence.token_ids)
        assert sequence.request.request_id.startswith(one.request)
    assert all(not one.block_table for one in snapshot.sequences if one.status == "waiting")
    return snapshot


@pytest.mark.parametrize("run_ahead", [False, True])
def test_snapshots_agree_with_the_tables_in_every_step(run_ahead: bool) -> None:
    """The pool is so small that sharing, copies, evictions and preemptions all happen."""
    harness = Harness(num_blocks=14, budget=40, max_num_seqs=6, run_ahead=run_ahead)
    take_snapshot(harness.scheduler)
    copied, evicted, shared = 0, 0, 0
    for number in range(6):
        harness.add(prompt(40) + prompt(5 + number, 3000 + 100 * number), 24, n=1 + number % 3)
    harness.add(prompt(90, 7000), 20)
    while harness.loop.has_work:
        harness.step()
        snapshot = agree(harness)
        copied += len(snapshot.copied)
        evicted += len(snapshot.evicted)
        shared += any(state > 2 for state in snapshot.blocks)
    stats = snapshot.stats
    assert stats.preemptions > 0 and shared > 0 and evicted > 0
    assert 0 < copied <= stats.blocks_copied
    assert snapshot.sequences == []
    assert snapshot.tokens_computed >= 7 * 45


def test_a_sequence_shows_its_chunks_decodes_and_preemptions() -> None:
    harness = Harness(num_blocks=6, budget=32)
    first = harness.add(prompt(40), 40)
    second = harness.add(prompt(8, 5000), 60)
    seen: dict[str, list[tuple[int, int, str]]] = {first.request_id: [], second.request_id: []}
    while harness.loop.has_work:
        harness.step()
        for one in agree(harness).sequences:
            seen[one.request].append((one.step_tokens, one.num_preemptions, one.status))
    assert [tokens for tokens, *_ in seen[first.request_id][:3]] == [32, 8, 1]
    assert (0, 1, "waiting") in seen[second.request_id]
    assert seen[second.request_id][-1][1:] == (1, "running")


def test_a_snapshot_shows_no_text_and_only_the_head_of_the_queue() -> None:
    harness = Harness(max_num_seqs=1)
    for number in range(MAX_WAITING + 9):
        harness.add(prompt(20), request_id=f"{number:08}secret")
    harness.step()
    snapshot = take_snapshot(harness.scheduler)
    assert [one.request for one in snapshot.sequences] == [
        f"{i:08}" for i in range(MAX_WAITING + 1)
    ]
    assert {one.status for one in snapshot.sequences[1:]} == {"waiting"}
    assert "secret" not in repr(snapshot)


def test_blocks_are_traced_only_while_somebody_watches() -> None:
    harness = Harness(num_blocks=8, budget=64)
    pool = harness.manager.pool
    harness.add(prompt(100), 4)
    harness.run()
    take_snapshot(harness.scheduler)
    harness.add(prompt(100, 5000), 4)
    harness.run()
    assert take_snapshot(harness.scheduler).evicted
    harness.add(prompt(100, 9000), 4)
    harness.manager.pool.trace = None
    harness.run()
    assert pool.trace is None
    assert take_snapshot(harness.scheduler).evicted == []


@pytest.mark.parametrize("count", [1, 253, 254, 255, 256, 1000])
def test_a_state_holds_counts_up_to_its_maximum(count: int) -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    assert block == 0
    for _ in range(count - 1):
        pool.share(block)
    assert list(pool.states()) == [min(count + 1, MAX_STATE), 0, 0]


def test_statuses_have_their_names() -> None:
    """A sequence that has finished is in no collection, so it is in no snapshot."""
    harness = Harness(num_blocks=8, max_num_seqs=1)
    request = harness.add(prompt(8), 2)
    harness.add(prompt(8), 2)
    harness.step()
    names = {one.status for one in take_snapshot(harness.scheduler).sequences}
    assert names == {"running", "waiting"}
    harness.scheduler.abort_request(request.request_id)
    assert all(
        one.status is not SequenceStatus.FINISHED for one in harness.scheduler.requests.unfinished()
    )
    assert request.request_id[:8] not in [
        one.request for one in take_snapshot(harness.scheduler).sequences
    ]
