"""Test which slot a state has, and which snapshots are taken, found and given up."""

from __future__ import annotations

import pytest

from quire.engine.step import StateCopy, StateSave

from ..harness import Harness, prompt


def harness(**options: object) -> Harness:
    """Blocks of 16 tokens, snapshots due after every 32."""
    fields = {"max_num_seqs": 4, "snapshots": 3, "num_blocks": 40} | options
    return Harness(**fields)  # type: ignore[arg-type]


def planned_saves(found: Harness) -> list[StateSave]:
    plan = found.scheduler.last_plan
    assert plan is not None
    return plan.state_saves


def num_snapshots(found: Harness) -> int:
    assert found.manager.states is not None
    return found.manager.states.num_cached


def test_snapshots_follow_intervals_and_the_prompts_last_block() -> None:
    found = harness()
    found.add(prompt(60), 10)
    found.step()
    assert [save.num_tokens for save in planned_saves(found)] == [48, 32]
    assert num_snapshots(found) == 2
    found.run()
    assert num_snapshots(found) == 3  # 64, on the way through the answer


def test_a_prompt_begins_at_the_last_snapshot_that_it_shares() -> None:
    found = harness()
    found.add(prompt(60), 1)
    found.run()
    found.add([*prompt(50), 7], 1)
    found.step()
    plan = found.scheduler.last_plan
    assert plan is not None and plan.starts == [48] and len(plan.state_copies) == 1
    found.run()
    found.assert_all_free()


def test_where_a_prompt_parts_from_another_one_a_snapshot_is_taken() -> None:
    found = harness(snapshots=8)
    found.add(prompt(90), 1)
    found.run()
    for tail, start in ((5, 0), (6, 16)):  # the first one parts after a block without a snapshot
        found.add([*prompt(20), tail] * 2, 1)
        found.step()
        plan = found.scheduler.last_plan
        assert plan is not None and plan.starts == [start]
        found.run()


def test_the_least_recently_used_snapshot_makes_way() -> None:
    found = harness(snapshots=2, max_num_seqs=1)
    cached = []
    for first in (1000, 2000, 1000, 3000, 1000, 2000):
        request = found.add(prompt(20, first), 1)
        found.run()
        cached.append(found.finals[request.request_id, 0].num_cached_tokens)
    assert cached == [0, 0, 16, 0, 16, 0]


def test_forks_copy_the_state() -> None:
    found = harness()
    found.add(prompt(20), 6, n=3)
    found.step()
    found.step()
    plan = found.scheduler.last_plan
    assert plan is not None
    slots = [sequence.state_slot for sequence in found.scheduler.running]
    assert plan.state_copies == [StateCopy(slots[0], slot) for slot in slots[1:]]
    assert len(set(slots)) == 3
    found.run()
    found.assert_all_free()


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_step_without_memory_loses_the_states_of_its_rows(run_ahead: bool) -> None:
    """The fake worker spoils them, as layers that came through before the failure do."""
    found = harness(run_ahead=run_ahead)
    for first in (1000, 2000, 3000):
        found.add(prompt(40, first), 12)
    for _ in range(4):
        found.step()
    found.worker.runs_out_of_memory = lambda _: True
    found.step()
    found.worker.runs_out_of_memory = lambda _: False
    assert not found.scheduler.running
    found.run()
    found.assert_all_free()
    assert found.scheduler.stats().preemptions == 3


def test_a_poisoned_sequence_leaves_no_snapshot() -> None:
    from quire.engine.outputs import RowError

    found = harness()
    request = found.add(prompt(60), 10)
    found.step()
    assert num_snapshots(found) == 2
    found.worker.errors[request.request_id] = RowError("nan", "made up")
    found.run()
    assert num_snapshots(found) == 0
    found.check_integrity()


def test_without_room_for_snapshots_nothing_is_matched() -> None:
    found = harness(snapshots=0)
    for _ in range(2):
        request = found.add(prompt(60), 2)
        found.run()
        assert found.finals[request.request_id, 0].num_cached_tokens == 0
    assert num_snapshots(found) == 0


def test_forgetting_the_cache_forgets_snapshots() -> None:
    found = harness()
    found.add(prompt(60), 2)
    found.run()
    found.manager.forget_free()
    assert num_snapshots(found) == 0
    found.check_integrity()
