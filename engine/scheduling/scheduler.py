"""Which sequences compute how many tokens in the next step.

There are no phases. Every sequence has tokens whose K/V is not computed yet; a step lets them
catch up under one token budget, running sequences first, then waiting ones as far as the free
blocks reach. A prompt's chunk, a decode and the recompute after a preemption differ only in how
far behind they are.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable

from ..cache.block_manager import BlockManager
from ..config import SchedulingPolicy
from ..errors import DeviceMemoryError, InvalidRequestError
from ..outputs import (
    EngineStats,
    FinishReason,
    ModelRunnerOutput,
    RowError,
    SchedulerOutput,
    SequenceOutput,
    TableChange,
    one_token,
)
from ..request import Request
from ..sequence import Rank, Sequence, SequenceStatus
from .admission import Admission
from .beam_search import BeamSearch
from .fair_queue import FairQueue
from .request_table import RequestTable
from .sequence_outputs import embedding_output, ended_output, take_prompt_logprobs, token_output
from .waiting_queue import WaitingQueue

Clock = Callable[[], float]
IsReady = Callable[[Request], bool]


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank


class Scheduler:
    """Owns every unfinished sequence; the block manager owns their blocks.

    `running` is sorted by rank. So the sequence to preempt is always the last, and never one
    that this step has already scheduled.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: tuple[int, ...] = (),
        policy: SchedulingPolicy = "fcfs",
        seed: int | None = None,
        clock: Clock = time.monotonic,
        is_ready: IsReady = lambda request: True,
    ) -> None:
        """`is_ready` says whether a waiting request may start; others pass it meanwhile."""
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []
        self._fair = FairQueue() if policy == "fair" else None
        self.waiting = WaitingQueue() if self._fair is None else self._fair
        self._clock = clock
        self._is_ready = is_ready
        self._admission = Admission(block_manager, clock)
        self._requests = RequestTable(policy, eos_token_ids, seed)
        self._budget = max_num_batched_tokens
        self._ran_out = False  # the last step found too little device memory
        self._released: list[int] = []
        self._beams = BeamSearch(block_manager, self.running, self.waiting, self._released)
        self._outputs: list[SequenceOutput] = []
        self._step = 0
        self._step_tokens = 0
        self._preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self._outputs or self._beams)

    # -- requests ---------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queue a request's sequences. Its limits have been checked (`Request.check_fits`)."""
        width = request.sampling_params.beam_width
        if width is not None and width > self.max_num_seqs:
            raise InvalidRequestError(f"more than {self.max_num_seqs} beams", "n")
        first, *others = sequences = self._requests.add(request)
        if width is not None:
            self._beams.add(sequences)
            return
        self.waiting.push(first)
        if first.num_prompt_tokens > 1:
            first.held_forks = others
            first.fork_at = first.num_prompt_tokens - 1
        else:
            for sequence in others:  # nothing is computed before the last token: nothing to share
                self.waiting.push(sequence)

    def abort_request(self, request_id: str, choice: int | None = None) -> None:
        """End a request's sequences, or the one of `choice`; unknown ids are ignored.

        The choices of a beam search end together.
        """
        for sequence in self._requests.find(request_id):
            if choice is None or sequence.choice == choice:
                self._end(sequence, "abort")

    def _fail(self, sequence: Sequence, error: RowError, *, poisoned: bool = False) -> None:
        self._end(sequence, "error", error=error, poisoned=poisoned)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        error: RowError | None = None,
        poisoned: bool = False,
    ) -> None:
        """The only way a sequence ends before its own last token; its blocks go back here."""
        if sequence.status is SequenceStatus.FINISHED:  # with another beam of its request
            return
        now = self._clock()
        for member in self._beams.remove(sequence):
            if member.choice < member.request.sampling_params.n:
                self._outputs.append(ended_output(member, reason, error, now))
            self._release(member, poisoned=poisoned)

    def _release(self, sequence: Sequence, *, poisoned: bool = False) -> None:
        """Take a sequence out of every collection and give its blocks back."""
        self._requests.remove(sequence)
        siblings = self._requests.find(sequence.request.request_id)
        if sequence.held_forks:  # the next sibling computes the prompt in its place
            heir, *others = sequence.held_forks
            heir.held_forks, sequence.held_forks = others, []
            heir.fork_at = sequence.fork_at
            self.waiting.push(heir)
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._released.append(sequence.seq_id)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        elif siblings and sequence in siblings[0].held_forks:
            siblings[0].held_forks.remove(sequence)
        self.block_manager.free(sequence, poisoned=poisoned)
        sequence.status = SequenceStatus.FINISHED

    # -- schedule ---------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's rows and give them their slots."""
        for sequence, error in self._requests.expired(self._clock()):
            self._fail(sequence, error)
        self._step += 1
        output = SchedulerOutput(self._step, [], [], [], 0, [], [], [])
        if self._fair is not None and self._may_preempt():
            self._fair.rank(self.running)
        preemptions = self._preemptions
        budget = self._schedule_running(output, self._budget)
        if self._preemptions == preemptions and not (self._ran_out and self.running):
            budget = self._schedule_waiting(output, budget)
        self.block_manager.end_step()
        output.released.extend(self._released)
        self._released.clear()
        self._step_tokens = self._budget - budget
        return output._replace(total_tokens=self._step_tokens)

    def _schedule_running(self, output: SchedulerOutput, budget: int) -> int:
        """Every running sequence gets at least one token, while the budget lasts: what an older
        one's chunk may take is bounded by what the younger ones' decodes need."""
        running, size = self.running, self.block_manager.block_size
        ref_counts = self.block_manager.pool.ref_counts
        rows, starts, counts = output.sequences, output.num_computed_starts, output.num_new_tokens
        i = 0
        while i < len(running) and budget > 0:
            sequence = running[i]
            computed = sequence.num_computed_tokens + sequence.num_in_flight
            num_new = len(sequence.token_ids) - computed
            if num_new != 1 or sequence.held_forks:
                num_new = self._fork_or_limit(sequence)
                if num_new == 0:  # a beam that waits for the others, or its last step is in flight
                    i += 1
                    continue
                num_new = min(num_new, max(budget - (len(running) - i - 1), 1))
            table = sequence.block_table
            fits = computed + num_new <= len(table) * size
            if not (fits and ref_counts[table[computed // size]] == 1) and not self._allocate(
                sequence, num_new, output
            ):
                break  # it was the last to run, and is preempted now
            rows.append(sequence)
            starts.append(computed)
            counts.append(num_new)
            budget -= num_new
            i += 1
        return budget

    def _may_preempt(self) -> bool:
        """Whether a step could want more blocks than there are: of each row one for its tokens'
        remainder and one for a copy, and those that the budget fills."""
        most = 2 * self.max_num_seqs + self._budget // self.block_manager.block_size
        return self.block_manager.pool.num_free < most

    def _fork_or_limit(self, sequence: Sequence) -> int:
        """The tokens that a running sequence may compute next; where siblings share them, no
        more than those, and once they are computed the siblings are forked off."""
        if sequence.held_forks:
            if sequence.num_computed_tokens < sequence.fork_at:
                return sequence.fork_at - sequence.num_computed_tokens - sequence.num_in_flight
            self._fork(sequence)
        return len(sequence.token_ids) - sequence.num_computed_tokens - sequence.num_in_flight

    def _allocate(self, sequence: Sequence, num_new: int, output: SchedulerOutput) -> bool:
        """Get slots, preempting from the end as needed; False if `sequence` itself had to go."""
        start = len(sequence.block_table)
        while (copies := self.block_manager.allocate_slots(sequence, num_new)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if copies:  # the copy replaced the block that held the first new token
            computed = sequence.num_computed_tokens + sequence.num_in_flight
            start = computed // self.block_manager.block_size
            output.block_copies.extend(copies)
        output.table_changes.append(TableChange(sequence, start))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Recompute later: the tokens stay, the blocks go (and are often found again by hash)."""
        assert self.running.pop() is sequence
        self.block_manager.free(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self._preemptions += 1
        self._released.append(sequence.seq_id)
        group = self._beams.group_of(sequence)
        if group is None:
            self.waiting.push(sequence)
        else:
            group.preempted = True  # it waits with the others, from the end of this step on

    def _fork(self, parent: Sequence) -> None:
        """Let the siblings share what is computed; those beyond max_num_seqs queue instead and
        find the prompt by its hash. (Beams have their seats reserved.)"""
        siblings, parent.held_forks = parent.held_forks, []
        is_beam = self._beams.group_of(parent) is not None
        for sibling in siblings:
            if not is_beam and self._num_seats_free() <= 0:
                self.waiting.push(sibling)
                continue
            self.block_manager.fork(parent, sibling)
            sibling.rank = parent.rank._replace(choice=sibling.choice)
            sibling.status = SequenceStatus.RUNNING
            sibling.scheduled_time = parent.scheduled_time
            sibling.num_cached_tokens = parent.num_cached_tokens
            insort(self.running, sibling, key=_rank)

    def _num_seats_free(self) -> int:
        return self.max_num_seqs - len(self.running) - self._beams.seats_reserved()

    def _schedule_waiting(self, output: SchedulerOutput, budget: int) -> int:
        not_ready: list[Sequence] = []
        while self.waiting and budget > 0 and (seats := self._num_seats_free()) > 0:
            sequence = self.waiting.peek()
            if not self._is_ready(sequence.request):
                not_ready.append(self.waiting.pop())
                continue
            group = self._beams.group_of(sequence)
            if group is not None and group.width > seats:
                break
            is_first = sequence.num_cached_tokens is None
            admitted = self._admission.admit(sequence, budget)
            if admitted is None:
                break
            self.waiting.pop()
            if self._fair is not None and is_first:
                self._fair.charge_prompt(sequence)
            sequence.status = SequenceStatus.RUNNING
            insort(self.running, sequence, key=_rank)
            output.block_copies.extend(admitted.copies)
            output.sequences.append(sequence)
            output.num_computed_starts.append(admitted.num_matched)
            output.num_new_tokens.append(admitted.num_new)
            budget -= admitted.num_new
        for sequence in not_ready:
            self.waiting.push(sequence)
        return budget

    def reduce_load(self) -> None:
        """The last step ran out of device memory, and none is in flight: have less in the next.

        Halves the budget and preempts the youngest, and admits nobody to the next step; so a
        sequence comes to run alone, and ends with DeviceMemoryError if it fails then under the
        smallest budget. The budget doubles again with every step that succeeds.
        """
        smallest = self.block_manager.block_size
        if len(self.running) > 1:
            self._preempt(self.running[-1])
        elif self._budget <= smallest and self.running:
            error = RowError(DeviceMemoryError.code, "out of device memory, even when run alone")
            self._fail(self.running[0], error)
        self._budget = max(min(self._budget, self._step_tokens) // 2, smallest)
        self._ran_out = True

    # -- update -----------------------------------------------------------------------------

    def update_from_output(
        self, output: SchedulerOutput, result: ModelRunnerOutput
    ) -> list[SequenceOutput]:
        """Advance what was computed, append what was sampled, end what is complete."""
        if self._budget < self.max_num_batched_tokens:
            self._budget = min(self._budget * 2, self.max_num_batched_tokens)
        if self._fair is not None:
            self._fair.charge_outputs(output.sequences, result.token_ids)
        self._ran_out = False
        now = self._clock()
        outputs = self._outputs
        if self._beams:
            result = self._beams.take(output, result)
        # Looking a member up in an enumeration takes as long as the rest of a row's bookkeeping.
        running, finished = SequenceStatus.RUNNING, SequenceStatus.FINISHED
        errors, logprobs = result.errors, result.logprobs
        for row, (sequence, start, num_new, token_id) in enumerate(
            zip(
                output.sequences,
                output.num_computed_starts,
                output.num_new_tokens,
                result.token_ids,
                strict=True,
            )
        ):
            if sequence.status is finished:
                continue  # it ended while the step was in flight
            if errors and row in errors:
                self._fail(sequence, errors[row], poisoned=True)
                continue
            end = start + num_new
            if sequence.status is running:  # else preempted: its tokens stay
                sequence.num_computed_tokens = end
                if sequence.num_in_flight:
                    sequence.num_in_flight -= num_new
                if end >= sequence.commit_at:
                    self.block_manager.commit_full_blocks(sequence)
            if result.prompt_logprobs and row in result.prompt_logprobs:
                take_prompt_logprobs(sequence, start, result.prompt_logprobs[row])
            if result.embeddings and row in result.embeddings:
                outputs.append(embedding_output(sequence, result.embeddings[row], now))
                self._release(sequence)
            if token_id is None:
                continue
            if end < len(sequence.token_ids):  # it stands as unknown
                sequence.token_ids[end] = token_id
            else:
                sequence.token_ids.append(token_id)
            if (
                sequence.first_token_time is not None
                and token_id not in sequence.stop_ids
                and end + 1 < sequence.stop_at
                and not (logprobs and row in logprobs)
            ):
                outputs.append(one_token(sequence.request.request_id, sequence.choice, token_id))
            else:
                final = token_output(sequence, end + 1, logprobs.get(row), now)
                outputs.append(final)
                if final.finish_reason:
                    self._release(sequence)
        if self._beams:
            self._advance_beams(now)
        self._outputs = []
        return outputs

    def _advance_beams(self, now: float) -> None:
        for group in self._beams.advance(now):
            first = group.sequences[0]
            if group.error is not None:
                self._fail(first, group.error, poisoned=True)
                continue
            self._outputs.extend(group.outputs(now))
            for member in self._beams.remove(first):
                self._release(member)

    def stats(self) -> EngineStats:
        pool = self.block_manager.pool
        return EngineStats(
            step=self._step,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            step_tokens=self._step_tokens,
            prefix_queries=self._admission.prefix_queries,
            prefix_hits=self._admission.prefix_hits,
            preemptions=self._preemptions,
            blocks_copied=self.block_manager.blocks_copied,
            blocks_shared=self.block_manager.blocks_shared,
        )
