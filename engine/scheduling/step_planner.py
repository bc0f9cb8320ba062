"""The planner chooses a step's rows: running sequences first, then waiting ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..cache.block_manager import BlockManager
from ..request import Request
from ..sequence import Sequence, SequenceStatus
from ..step import BlockCopy, StateCopy, StateSave, TableChange
from ..tiers.readmission import Readiness, Readmission
from .admission import Admission
from .beam_search import BeamSearch
from .policy import Policy
from .roster import Roster

IsReady = Callable[[Request], bool]


class Plan(NamedTuple):
    """The lists of a plan that is being made. The first three are parallel, with one entry for
    each row: its sequence, its first token's position, and its number of tokens."""

    rows: list[Sequence]
    starts: list[int]
    counts: list[int]
    token_ids: list[int]
    partial_rows: list[int]
    block_copies: list[BlockCopy]
    table_changes: list[TableChange]
    state_copies: list[StateCopy]
    state_saves: list[StateSave]


class StepPlanner:
    """Gives a step's rows their tokens and slots, under one token budget.

    `is_ready` decides whether a waiting request may start; if not, later ones pass it.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        roster: Roster,
        policy: Policy,
        beams: BeamSearch,
        admission: Admission,
        *,
        max_num_seqs: int,
        is_ready: IsReady,
    ) -> None:
        self.preemptions = 0
        self._block_manager = block_manager
        self._roster = roster
        self._policy = policy
        self._beams = beams
        self._admission = admission
        self._max_num_seqs = max_num_seqs
        self._is_ready = is_ready
        self.readmission: Readmission | None = None
        """Brings evicted blocks of waiting sequences back, if they are kept anywhere."""

    def plan(self, step: int, budget: int, *, hold: bool) -> tuple[Plan, int]:
        """Return the rows of step number `step`, and what is left of the budget.

        `hold` says that no request may be admitted beside others (see StepBudget).
        """
        plan, preemptions = Plan([], [], [], [], [], [], [], [], []), self.preemptions
        # 1. Running sequences first. Ranks that depend on service only matter if one of them may
        #    be preempted.
        if self._may_preempt(budget):
            self._policy.rerank(self._roster.running)
        left = self._schedule_running(plan, budget)
        # 2. Then waiting ones. None is admitted in a step that preempted, since it would take the
        #    victim's blocks; nor under a hold, unless nothing runs.
        if self.preemptions == preemptions and not (hold and self._roster.running):
            left = self._schedule_waiting(plan, left, one_request=hold)
        # 3. What running sequences have given back since the last step.
        for sequence, change in self._block_manager.take_window_changes():
            if sequence.status is SequenceStatus.RUNNING and self._roster.knows(sequence):
                plan.table_changes.append(change)
        # 4. The sources of this step's copies may be reused by the next step.
        self._block_manager.end_step()
        # 5. States: what forks and prefixes copy, and which snapshots the rows take.
        if (states := self._block_manager.states) is not None:
            plan.state_saves.extend(states.plan_saves(step, plan.rows, plan.starts, plan.counts))
            plan.state_copies.extend(states.take_copies())
        return plan, left

    def waiting_tokens(self, plan: Plan | None) -> int:
        """Return how many tokens wait, and how many the rows of the last plan leave."""
        waiting = self._policy.num_tokens
        if plan is not None:
            for row in plan.partial_rows:
                sequence = plan.rows[row]
                if sequence.status is SequenceStatus.RUNNING:
                    waiting += len(sequence.token_ids) - plan.starts[row] - plan.counts[row]
        return waiting

    def _schedule_running(self, plan: Plan, budget: int) -> int:
        """Give every running sequence at least one token, while the budget lasts; return what is
        left of it.

        An older sequence's chunk is bounded by what the decodes of the younger ones need.
        """
        running, size = self._roster.running, self._block_manager.block_size
        ref_counts = self._block_manager.pool.ref_counts
        rows, starts, counts, token_ids = plan.rows, plan.starts, plan.counts, plan.token_ids
        i = 0
        while i < len(running) and budget > 0:
            sequence = running[i]
            tokens = sequence.token_ids
            # 1. How many tokens. Almost always one is left: a decode.
            computed = sequence.num_computed_tokens + sequence.num_in_flight
            num_new = num_left = len(tokens) - computed
            if num_left != 1 or sequence.held_forks:
                num_new = self._fork_or_limit(sequence)
                # 0: a beam that waits for the others, or a sequence whose last step is in flight.
                if num_new == 0:
                    i += 1
                    continue
                num_new = min(num_new, max(budget - (len(running) - i - 1), 1))
            # 2. Their slots. Most rows have one in a block that is theirs, which is looked up here
            #    rather than in a call: this loop runs for every row of every step.
            table = sequence.block_table
            fits = computed + num_new <= len(table) * size
            if not (fits and ref_counts[table[computed // size]] == 1) and not self._allocate(
                sequence, num_new, plan
            ):
                break  # it was the last to run, and is preempted now
            # 3. The row.
            if num_left == 1:
                token_ids.append(tokens[computed])
            else:
                token_ids.extend(tokens[computed : computed + num_new])
                if num_new < num_left:
                    plan.partial_rows.append(len(rows))
            rows.append(sequence)
            starts.append(computed)
            counts.append(num_new)
            budget -= num_new
            i += 1
        return budget

    def _may_preempt(self, budget: int) -> bool:
        """Return whether a step could want more blocks than there are.

        A row can want one for the remainder of its tokens and one for a copy, besides those that
        the budget fills, in each group of layers.
        """
        most = 2 * self._max_num_seqs + budget // self._block_manager.block_size
        return self._block_manager.pool.num_free < most * self._block_manager.num_groups

    def _fork_or_limit(self, sequence: Sequence) -> int:
        """Return how many tokens a running sequence may compute next.

        If it holds siblings, these are the tokens that they share; once they are computed, the
        siblings are forked off.
        """
        if sequence.held_forks:
            if sequence.num_computed_tokens < sequence.fork_at:
                return sequence.fork_at - sequence.num_computed_tokens - sequence.num_in_flight
            self._fork(sequence)
        return len(sequence.token_ids) - sequence.num_computed_tokens - sequence.num_in_flight

    def _allocate(self, sequence: Sequence, num_new: int, plan: Plan) -> bool:
        """Get slots, preempting from the end as needed.

        Returns False if `sequence` itself had to go.
        """
        start = len(sequence.block_table)
        while (copies := self._block_manager.allocate_slots(sequence, num_new)) is None:
            victim = self._roster.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return False
        if copies:  # the copy replaced the block that held the first new token
            computed = sequence.num_computed_tokens + sequence.num_in_flight
            start = computed // self._block_manager.block_size
            plan.block_copies.extend(copies)
        if self._roster.knows(sequence):
            plan.table_changes.extend(self._block_manager.changes_from(sequence, start))
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it will recompute its tokens later.

        Its tokens stay, and many of its blocks are often found again by their hashes.
        """
        self._roster.remove(sequence, SequenceStatus.WAITING)
        self._block_manager.free(sequence)
        sequence.num_preemptions += 1
        self.preemptions += 1
        group = self._beams.group_of(sequence)
        if group is None:
            self._policy.push(sequence)
        else:
            group.preempted = True  # the group waits together, from the end of this step on

    def lose_states(self, rows: list[Sequence]) -> None:
        """Preempt the rows of a step that failed if the model keeps states: those of its layers
        that came through have changed theirs in place."""
        states = self._block_manager.states
        if states is None:
            return
        states.drop_pending()
        for sequence in reversed(rows):
            if sequence.status is SequenceStatus.RUNNING:
                self.preempt(sequence)

    def _fork(self, parent: Sequence) -> None:
        """Let the siblings share what is computed.

        Those beyond max_num_seqs queue instead and find the prompt by its hash. (Beams have their
        seats reserved.)
        """
        siblings, parent.held_forks = parent.held_forks, []
        is_beam = self._beams.group_of(parent) is not None
        for sibling in siblings:
            if not is_beam and self._num_seats_free() <= 0:
                self._policy.push(sibling)
                continue
            self._block_manager.fork(parent, sibling)
            sibling.rank = parent.rank._replace(choice=sibling.choice)
            sibling.scheduled_time = parent.scheduled_time
            sibling.num_cached_tokens = parent.num_cached_tokens
            self._roster.add(sibling)

    def _num_seats_free(self) -> int:
        return self._max_num_seqs - len(self._roster.running) - self._beams.seats_reserved()

    def _schedule_waiting(self, plan: Plan, budget: int, *, one_request: bool) -> int:
        """Admit waiting sequences as far as seats, blocks and budget reach, or those of a single
        request; return what is left of the budget."""
        not_ready: list[Sequence] = []
        adapters = self._roster.adapters
        adapters.begin_admission()
        while self._policy and budget > 0 and (seats := self._num_seats_free()) > 0:
            sequence = self._policy.peek()
            if one_request and plan.rows and sequence.request is not plan.rows[0].request:
                break
            if not self._is_ready(sequence.request):
                not_ready.append(self._policy.pop())
                continue
            if sequence.adapter_id is not None and not adapters.admits(sequence):
                not_ready.append(self._policy.pop())
                continue
            group = self._beams.group_of(sequence)
            if group is not None and group.width > seats:
                break
            if self.readmission is not None and not sequence.needs_whole_prompt:
                reach = self._admission.target(sequence) - 1
                readiness = self.readmission.bring_back(sequence, reach, budget)
                if readiness is Readiness.NEXT_STEP:
                    break
                if readiness is Readiness.WAITS_BELOW:
                    not_ready.append(self._policy.pop())
                    continue
            is_first = sequence.num_cached_tokens is None
            admitted = self._admission.admit(sequence, budget)
            if admitted is None:
                break
            self._policy.pop()
            if sequence.adapter_id is not None:
                adapters.admitted(sequence)
            if is_first and not sequence.request.has_delivered:  # otherwise it has been charged
                self._policy.charge_prompt(sequence)
            self._roster.add(sequence)
            start, end = admitted.num_matched, admitted.num_matched + admitted.num_new
            if end < len(sequence.token_ids):
                plan.partial_rows.append(len(plan.rows))
            plan.block_copies.extend(admitted.copies)
            plan.rows.append(sequence)
            plan.starts.append(start)
            plan.counts.append(admitted.num_new)
            plan.token_ids.extend(sequence.token_ids[start:end])
            budget -= admitted.num_new
        for sequence in not_ready:
            self._policy.put_back(sequence)
        return budget
