"""Bugs that are put into quire on purpose, each of which some seed must find.

A simulation that finds nothing proves nothing unless it would have found these.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from quire.engine.cache.block_manager import NO_MATCH, BlockManager
from quire.engine.cache.block_pool import BlockPool
from quire.engine.cache.state_slots import StateSlots
from quire.engine.core.trials import Trials
from quire.engine.outputs import RowError, StepOutput
from quire.engine.process.engine_process import EngineServer
from quire.engine.process.remote_client import RemoteEngineClient
from quire.engine.process.stream import Stream
from quire.engine.process.streams import StreamTable
from quire.engine.scheduling.drafting import Drafting
from quire.engine.scheduling.ranked_queue import RankedQueue
from quire.engine.scheduling.request_table import RequestTable
from quire.engine.scheduling.scheduler import Scheduler
from quire.engine.scheduling.step_planner import StepPlanner
from quire.engine.sequence import Sequence
from quire.engine.step import StateCopy
from quire.engine.tiers import lower_tier
from quire.engine.tiers.host_store import HostStore
from quire.engine.tiers.sealed_block import HEADER_BYTES

from . import world
from .world import Settings, World

Patch = pytest.MonkeyPatch
SEEDS = range(40)
"""Seeds to try; the first that finds the bug ends the test."""


def _every(number: int) -> Callable[[], bool]:
    """Return a function that is true at every so many calls."""
    calls = 0

    def is_due() -> bool:
        nonlocal calls
        calls += 1
        return calls % number == 0

    return is_due


def a_free_is_skipped(patch: Patch) -> None:
    free, is_due = BlockManager.free, _every(50)

    def buggy(self: BlockManager, sequence: Sequence, *, poisoned: bool = False) -> None:
        if is_due():
            sequence.block_table.clear()
        free(self, sequence, poisoned=poisoned)

    patch.setattr(BlockManager, "free", buggy)


def a_block_is_freed_while_it_is_shared(patch: Patch) -> None:
    share, is_due = BlockPool.share, _every(200)

    def buggy(self: BlockPool, block: int) -> None:
        share(self, block)
        if self.ref_counts[block] > 1 and is_due():
            self.ref_counts[block] -= 1

    patch.setattr(BlockPool, "share", buggy)


def a_shared_block_is_written(patch: Patch) -> None:
    patch.setattr(BlockManager, "_is_shared", lambda self, block: False)


def salts_are_ignored(patch: Patch) -> None:
    parent = BlockManager._parent_hash

    def buggy(self: BlockManager, sequence: Sequence, i: int) -> bytes:
        return parent(self, sequence, i) if i else b"root" * 8

    patch.setattr(BlockManager, "_parent_hash", buggy)


def a_match_is_too_long(patch: Patch) -> None:
    match_prefix = BlockManager.match_prefix

    def buggy(self: BlockManager, sequence: Sequence, max_tokens: int) -> Any:
        match = match_prefix(self, sequence, max_tokens)
        if match is NO_MATCH or not match.successor or match.num_tokens >= max_tokens:
            return match
        longer = match.successor._replace(num_tokens=match.successor.num_tokens + 1)
        if longer.num_tokens >= self.block_size:
            return match
        return match._replace(successor=longer, num_tokens=match.num_tokens + 1)

    patch.setattr(BlockManager, "match_prefix", buggy)


def the_queue_is_reordered(patch: Patch) -> None:
    push, is_due = RankedQueue.push, _every(10)

    def buggy(self: RankedQueue, sequence: Sequence) -> None:
        if is_due():
            sequence.rank = sequence.rank._replace(arrival_order=-sequence.rank.arrival_order)
        push(self, sequence)

    patch.setattr(RankedQueue, "push", buggy)


def a_request_goes_last(patch: Patch) -> None:
    add = RequestTable.add

    def buggy(self: RequestTable, request: Any, priority: int) -> list[Sequence]:
        last = 10**9 if request.user == "l" else 0
        return add(self, request, priority + last)

    patch.setattr(RequestTable, "add", buggy)


def nobody_is_admitted_for_long(patch: Patch) -> None:
    admit, is_due = StepPlanner._schedule_waiting, _every(60)

    def buggy(self: StepPlanner, plan: Any, budget: int, **options: Any) -> int:
        return admit(self, plan, budget, **options) if is_due() else budget

    patch.setattr(StepPlanner, "_schedule_waiting", buggy)


def a_step_is_delivered_twice(patch: Patch) -> None:
    send, is_due = EngineServer._send_step, _every(100)

    def buggy(self: EngineServer, step: StepOutput) -> None:
        if is_due():
            send(self, step)
        send(self, step)

    patch.setattr(EngineServer, "_send_step", buggy)


def a_step_is_not_delivered(patch: Patch) -> None:
    send, is_due = EngineServer._send_step, _every(100)

    def buggy(self: EngineServer, step: StepOutput) -> None:
        send(self, step._replace(outputs=[]) if is_due() else step)

    patch.setattr(EngineServer, "_send_step", buggy)


def a_failed_row_fails_its_neighbour(patch: Patch) -> None:
    fail = Scheduler._fail

    def buggy(
        self: Scheduler, sequence: Sequence, error: RowError, *, poisoned: bool = False
    ) -> None:
        fail(self, self.running[-1] if self.running else sequence, error, poisoned=poisoned)

    patch.setattr(Scheduler, "_fail", buggy)


def deadlines_are_forgotten(patch: Patch) -> None:
    def buggy(self: RequestTable, now: float) -> Iterator[Any]:
        return iter(())

    patch.setattr(RequestTable, "expired", buggy)


def aborts_are_forgotten(patch: Patch) -> None:
    patch.setattr(RemoteEngineClient, "abort_request", lambda self, request_id, choice: None)


def an_abort_ends_another_request(patch: Patch) -> None:
    abort = Scheduler.abort_request

    def buggy(self: Scheduler, request_id: str, choice: int | None = None) -> None:
        abort(self, request_id, choice)
        for sequence in list(self.running[-1:]):
            abort(self, sequence.request.request_id)

    patch.setattr(Scheduler, "abort_request", buggy)


def a_wrong_draft_is_accepted(patch: Patch) -> None:
    take = Drafting.take

    def buggy(
        self: Drafting, sequence: Any, start: int, row: int, draft: list[int], *rest: Any
    ) -> Any:
        result, now = rest
        result.after_drafts[row][:1] = [5]
        return take(self, sequence, start, row, [result.token_ids[row], *draft[1:]], result, now)

    patch.setattr(Drafting, "take", buggy)


def a_token_is_dropped(patch: Patch) -> None:
    update, is_due = Scheduler.update_from_output, _every(300)

    def buggy(self: Scheduler, *rest: Any) -> Any:
        outputs = update(self, *rest)
        return [
            one._replace(token_ids=[]) if one.token_ids and is_due() else one for one in outputs
        ]

    patch.setattr(Scheduler, "update_from_output", buggy)


def a_moved_request_starts_over(patch: Patch) -> None:
    continuation = Stream.continuation
    patch.setattr(Stream, "continuation", lambda self: replace(continuation(self), resume=()))


def a_moved_request_forgets_its_last_token(patch: Patch) -> None:
    continuation = Stream.continuation

    def buggy(self: Stream) -> Any:
        request = continuation(self)
        shorter = tuple(tokens and tokens[:-1] for tokens in request.resume)
        return replace(request, resume=shorter)

    patch.setattr(Stream, "continuation", buggy)


def a_choice_that_has_ended_moves_too(patch: Patch) -> None:
    continuation = Stream.continuation

    def buggy(self: Stream) -> Any:
        request = continuation(self)
        return replace(request, resume=tuple(tokens or () for tokens in request.resume))

    patch.setattr(Stream, "continuation", buggy)


def a_move_changes_the_seed(patch: Patch) -> None:
    continuation = Stream.continuation

    def buggy(self: Stream) -> Any:
        request = continuation(self)
        params = replace(request.sampling_params, seed=self.moves)
        return replace(request, sampling_params=params)

    patch.setattr(Stream, "continuation", buggy)


def nobody_resumes_what_waits(patch: Patch) -> None:
    patch.setattr(StreamTable, "resume", lambda self: None)


def deaths_are_not_counted(patch: Patch) -> None:
    detach = StreamTable._detach

    def buggy(self: StreamTable, stream: Stream, is_death: bool) -> None:
        stream.runs = False
        detach(self, stream, is_death)

    patch.setattr(StreamTable, "_detach", buggy)


def suspects_begin_together(patch: Patch) -> None:
    patch.setattr(Trials, "admits", lambda self, request: True)


def a_trial_never_ends(patch: Patch) -> None:
    patch.setattr(Trials, "observe", lambda self, outputs: None)


def a_moved_request_may_wait_for_ever(patch: Patch) -> None:
    patch.setattr(Stream, "limit", lambda self, now: None)


def a_state_slot_is_not_given_back(patch: Patch) -> None:
    release, is_due = StateSlots.release, _every(20)

    def buggy(self: StateSlots, sequence: Sequence) -> None:
        if is_due():
            sequence.state_slot = -1
        release(self, sequence)

    patch.setattr(StateSlots, "release", buggy)


def a_fork_starts_with_another_state(patch: Patch) -> None:
    def buggy(self: StateSlots, parent: Sequence, child: Sequence) -> None:
        child.state_slot = self._take()
        self._copies.append(StateCopy(child.state_slot, child.state_slot))

    patch.setattr(StateSlots, "fork", buggy)


def a_match_goes_past_its_snapshot(patch: Patch) -> None:
    count_usable = StateSlots.count_usable

    def buggy(self: StateSlots, hashes: abc.Sequence[bytes]) -> int:
        return len(hashes) if count_usable(self, hashes) else 0

    hold = StateSlots.hold

    def hold_any(self: StateSlots, sequence: Sequence, snapshot: bytes | None) -> None:
        known = snapshot if snapshot in self._snapshots else next(iter(self._snapshots), None)
        hold(self, sequence, known if snapshot else None)

    patch.setattr(StateSlots, "count_usable", buggy)
    patch.setattr(StateSlots, "hold", hold_any)


def states_outlive_a_step_without_memory(patch: Patch) -> None:
    patch.setattr(StepPlanner, "lose_states", lambda self, rows: None)


def damaged_records_are_used(patch: Patch) -> None:
    patch.setattr(lower_tier, "unseal", lambda fingerprint, own_hash, record: record[HEADER_BYTES:])


def a_slot_is_reused_while_it_is_in_use(patch: Patch) -> None:
    patch.setattr(HostStore, "_may_change", lambda self, slot: True)


BUGS = {
    a_free_is_skipped: "check_integrity",
    a_block_is_freed_while_it_is_shared: "",
    a_shared_block_is_written: "foreign K/V",
    salts_are_ignored: "foreign K/V",
    a_match_is_too_long: "foreign K/V",
    the_queue_is_reordered: "went before",
    a_request_goes_last: "went before",
    nobody_is_admitted_for_long: "waited",
    a_step_is_delivered_twice: "",
    a_step_is_not_delivered: "",
    a_failed_row_fails_its_neighbour: "",
    deadlines_are_forgotten: "after its deadline",
    aborts_are_forgotten: "its client has left",
    an_abort_ends_another_request: "nobody asked for it",
    a_wrong_draft_is_accepted: "",
    a_token_is_dropped: "",
    a_moved_request_starts_over: "",
    a_moved_request_forgets_its_last_token: " got ",
    a_choice_that_has_ended_moves_too: "goes on after its end",
    a_move_changes_the_seed: "another seed",
    nobody_resumes_what_waits: "",
    deaths_are_not_counted: "has killed",
    suspects_begin_together: "ended with the poison",
    a_trial_never_ends: "never ends",
    a_moved_request_may_wait_for_ever: "after its deadline",
    a_state_slot_is_not_given_back: "state slot",
    a_fork_starts_with_another_state: "",
    a_match_goes_past_its_snapshot: "foreign state",
    states_outlive_a_step_without_memory: "",
    damaged_records_are_used: "foreign K/V",
    a_slot_is_reused_while_it_is_in_use: "",
}
"""Each bug, and words of the violation that it leads to."""
CROWDED = (suspects_begin_together, a_trial_never_ends)
"""Bugs that show only if a poisonous request runs beside several others."""
TIERED = (damaged_records_are_used, a_slot_is_reused_while_it_is_in_use)
"""Bugs that show only if blocks are evicted."""


def _settings(seed: int, bug: Callable[[Patch], None]) -> Settings:
    settings = Settings.draw(seed, 60)
    if bug in TIERED:
        return replace(
            settings, host_slots=4, store_faults=0.1, prefix_caching=True,
            num_blocks=-(-130 // settings.block_size),
        )  # fmt: skip
    if bug not in CROWDED:
        return settings
    return replace(
        settings, swarm=frozenset({"poison"}), max_restarts=10**9, num_workers=0, budget=128,
        max_num_seqs=12, num_blocks=1000, max_step_tokens=None, policy="fcfs",
    )  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_is_found(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        bug(patch)
        if bug in CROWDED:
            patch.setattr(world, "TIME_LIMIT", 60.0)
        reports = (World(_settings(seed, bug)).run() for seed in SEEDS)
        violation = next((one.violation for one in reports if one.violation), None)
    assert violation is not None, "no seed finds it"
    assert BUGS[bug] in violation
