"""The scheduler decides which sequences compute how many tokens in the next step.

There are no phases. Every sequence has tokens whose K/V is not computed yet. A step lets them catch
up under one token budget: running sequences first, then waiting ones as far as free blocks reach.
Prompts' chunks, decodes and recomputes after a preemption differ only in how far behind they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..cache.block_manager import BlockManager
from ..config import SchedulingPolicy
from ..errors import DeviceMemoryError, InvalidRequestError
from ..outputs import EngineStats, FinishReason, RowError, SequenceOutput, one_token
from ..request import Request
from ..sequence import ReadingRow, Sequence, SequenceStatus
from ..speculation.speculator import Speculator
from ..step import UNKNOWN_TOKEN, ModelRunnerOutput, SchedulerOutput
from .adapter_table import AdapterTable
from .admission import Admission
from .beam_search import BeamSearch
from .drafting import Drafting
from .policy import make_policy
from .request_table import RequestTable
from .roster import Roster
from .sequence_outputs import embedding_output, ended_output, take_prompt_logprobs, token_output
from .step_budget import StepBudget
from .step_planner import IsReady, Plan, StepPlanner

Clock = Callable[[], float]


class Scheduler:
    """Owns every unfinished sequence; the block manager owns their blocks.

    The roster holds sequences that run, the policy those that wait, a sibling what it will fork.
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
        adapters: AdapterTable | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        """`is_ready` decides whether a waiting request may start; if not, later ones pass it.
        Without `adapters` no request can have one; without a `speculator` there are no drafts."""
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.waiting = make_policy(policy)
        self._roster = Roster(adapters)
        self._clock = clock
        self._admission = Admission(block_manager, clock)
        self.requests = RequestTable(eos_token_ids, seed)
        self._beams = BeamSearch(block_manager, self._roster, self.waiting)
        self._planner = StepPlanner(
            block_manager,
            self._roster,
            self.waiting,
            self._beams,
            self._admission,
            max_num_seqs=max_num_seqs,
            is_ready=is_ready,
        )
        self._drafting: Drafting | None = None
        if speculator is not None:
            self._drafting = Drafting(speculator, block_manager, self._roster, clock)
        self._launched: dict[int, list[Sequence]] = {}
        """The sequences of the rows of each step whose results have not arrived, by step."""
        smallest = min(block_manager.block_size, max_num_batched_tokens)
        self.budget = StepBudget(max_num_batched_tokens, smallest)
        self._outputs: list[SequenceOutput] = []
        self._step = 0
        self._step_tokens = 0
        self.tokens_computed = 0
        self.last_plan: Plan | None = None

    @property
    def running(self) -> list[Sequence]:
        """The running sequences, sorted by rank."""
        return self._roster.running

    @property
    def has_work(self) -> bool:
        """Whether anything runs, waits, or is yet to be reported."""
        return bool(self.running or self.waiting or self._outputs or self._beams)

    # -- requests ---------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queue a request's sequences. Its limits have been checked (`Request.check_fits`)."""
        width = request.sampling_params.beam_width
        if width is not None and width > self.max_num_seqs:
            raise InvalidRequestError(f"more than {self.max_num_seqs} beams", "n")
        adapters, name = self._roster.adapters, request.adapter
        adapter_id = None if name is None else adapters.id_of(name)
        priority = self.waiting.priority_of(request)
        first, *others = sequences = self.requests.add(request, priority)
        if adapter_id is not None:
            for sequence in sequences:
                adapters.hold(sequence, adapter_id)
        if width is not None:
            self._beams.add(sequences)
            return
        self.waiting.push(first)
        if first.num_prompt_tokens > 1:
            first.held_forks = others
            first.fork_at = first.num_prompt_tokens - 1
        else:
            for sequence in others:  # no token precedes the last: there is nothing to share
                self.waiting.push(sequence)

    def abort_request(self, request_id: str, choice: int | None = None) -> None:
        """End a request's sequences, or only that of `choice`. Unknown ids are ignored.

        The choices of a beam search end together.
        """
        for sequence in self.requests.find(request_id):
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
        """End a sequence before its own last token, and report it.

        Every abort, deadline and error comes through here.
        """
        if sequence.status is SequenceStatus.FINISHED:  # together with another beam of its request
            return
        now = self._clock()
        for member in self._beams.remove(sequence):
            if member.choice < member.request.sampling_params.n:
                output = ended_output(member, reason, error, now)
                if self._drafting is not None:
                    output = output._replace(predicted=self._drafting.predicted(member))
                self._outputs.append(output)
            self._release(member, poisoned=poisoned)

    def _release(self, sequence: Sequence, *, poisoned: bool = False) -> None:
        """Take a sequence out of every collection and give its blocks back.

        Every end comes through here.
        """
        self.requests.remove(sequence)
        siblings = self.requests.find(sequence.request.request_id)
        if sequence.held_forks:  # the next sibling will compute the prompt instead
            heir, *others = sequence.held_forks
            heir.held_forks, sequence.held_forks = others, []
            heir.fork_at = sequence.fork_at
            self.waiting.push(heir)
        if sequence.status is SequenceStatus.RUNNING:
            self._roster.remove(sequence, SequenceStatus.FINISHED)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        elif siblings and sequence in siblings[0].held_forks:
            siblings[0].held_forks.remove(sequence)
        self.block_manager.free(sequence, poisoned=poisoned)
        if self._drafting is not None:
            self._drafting.forget(sequence)
        sequence.status = SequenceStatus.FINISHED
        if sequence.adapter_id is not None:
            self._roster.adapters.release(sequence)

    # -- schedule ---------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's rows and give them their slots."""
        for sequence, error in self.requests.expired(self._clock()):
            self._fail(sequence, error)
        self._step += 1
        hold = self.budget.holds_admission
        plan, left = self._planner.plan(self._step, self.budget.tokens, hold=hold)
        drafts = self._drafting.add(plan, left) if self._drafting and not hold else {}
        self._step_tokens = len(plan.token_ids)
        self._launched[self._step] = plan.rows
        self.tokens_computed += self._step_tokens
        self.last_plan = plan
        return SchedulerOutput(
            step=self._step,
            seq_ids=self._roster.seq_ids(plan.rows),
            num_computed_starts=plan.starts,
            num_new_tokens=plan.counts,
            token_ids=plan.token_ids,
            partial_rows=plan.partial_rows,
            new_sequences=self._roster.introduce(plan.rows),
            block_copies=plan.block_copies,
            table_changes=plan.table_changes,
            released=self._roster.take_released(),
            adapter_loads=self._roster.adapters.take_loads(),
            drafts=drafts,
            state_copies=plan.state_copies,
            state_saves=plan.state_saves,
        )

    def with_drafts(self, plan: SchedulerOutput, drafts: dict[int, list[int]]) -> SchedulerOutput:
        """Return what is left of a plan once the worker has proposed these drafts, by row."""
        assert self._drafting is not None
        return self._drafting.take_proposals(plan, drafts)

    def rows_that_read(self, output: SchedulerOutput) -> list[ReadingRow]:
        """Return the rows of a plan that sample, and whose sampling reads the tokens before."""
        if not self._roster.num_reading:
            return []
        partial = set(output.partial_rows)
        return [
            ReadingRow(row, sequence, output.drafts.get(row, []))
            for row, sequence in enumerate(self._launched[output.step])
            if sequence.reads_tokens and sequence.reads_next_token and row not in partial
        ]

    @property
    def waits_for_results(self) -> bool:
        """Whether no step can be scheduled before the results of the last one have arrived: beams
        continue with tokens that the scheduler chooses among their candidates, and drafts follow
        known tokens, if there are any drafts lately."""
        if self._drafting is not None and self._drafting.waits_for_results(len(self.running)):
            return True
        return bool(self._beams) and any(sequence.is_beam for sequence in self.running)

    def mark_in_flight(self, output: SchedulerOutput) -> None:
        """Schedule from now on as if a launched step had computed its tokens.

        The token that a row samples stands as UNKNOWN_TOKEN until the results arrive, unless it
        will be the sequence's last one by its length.
        """
        starts, counts = output.num_computed_starts, output.num_new_tokens
        for sequence, start, num_new in zip(
            self._launched[output.step], starts, counts, strict=True
        ):
            sequence.num_in_flight += num_new
            end = start + num_new
            goes_on = end == len(sequence.token_ids) and end + 1 < sequence.stop_at
            if goes_on and not (sequence.is_beam or sequence.pooling):
                sequence.token_ids.append(UNKNOWN_TOKEN)

    def reduce_load(self) -> None:
        """Make the next step smaller, after one that ran out of device memory. None is in flight.

        Halves the budget, preempts the youngest sequence, and admits none to the next steps (see
        StepBudget). So a sequence runs by itself in the end, and fails if that is too much under
        the smallest budget.
        """
        launched = [row for rows in self._launched.values() for row in rows]
        self._launched.clear()
        # Beams go on only together: preempting one of a search that is alone undoes all its steps.
        alone = len({id(one.request) if one.is_beam else one.seq_id for one in self.running}) == 1
        if len(self.running) > 1 and not (alone and not self.budget.is_smallest):
            self._planner.preempt(self.running[-1])
        elif self.budget.is_smallest and self.running:
            error = RowError(DeviceMemoryError.code, "out of device memory, even when run alone")
            self._fail(self.running[0], error)
            self.budget.found_culprit()
        self._planner.lose_states(launched)
        self.budget.ran_out(self._step_tokens)

    # -- update -----------------------------------------------------------------------------

    # Over 50 lines: a call for each row would take as long as the rest of the row's bookkeeping.
    def update_from_output(
        self, output: SchedulerOutput, result: ModelRunnerOutput
    ) -> list[SequenceOutput]:
        """Advance what was computed, append what was sampled, end what is complete."""
        rows = self._launched.pop(output.step)
        self.budget.succeeded()
        self.waiting.charge_outputs(rows, result.token_ids)
        now = self._clock()
        if self._drafting is not None and not self._launched and not output.partial_rows:
            self._drafting.observe(output, now)
        outputs = self._outputs
        self.block_manager.commit_states(output.step, result.errors)
        if self._beams:
            result = self._beams.take(rows, result)
        # Looking a member up in an enumeration takes as long as the rest of a row's bookkeeping.
        running, finished = SequenceStatus.RUNNING, SequenceStatus.FINISHED
        errors, logprobs = result.errors, result.logprobs
        for row, (sequence, start, num_new, token_id) in enumerate(
            zip(
                rows,
                output.num_computed_starts,
                output.num_new_tokens,
                result.token_ids,
                strict=True,
            )
        ):
            # 1. Rows that have nothing to update.
            if sequence.status is finished:
                continue  # it ended while the step was in flight
            if errors and row in errors:
                self._fail(sequence, errors[row], poisoned=True)
                continue
            if output.drafts and row in output.drafts:
                assert self._drafting is not None
                draft = output.drafts[row]
                final = self._drafting.take(sequence, start, row, draft, result, now)
                more = final.token_ids[1:]
                self.waiting.charge_outputs([sequence] * len(more), more)
                self._report(final, sequence, outputs)
                continue
            # 2. K/V: what was computed counts, unless the sequence was preempted since and gave
            #    its blocks back; its sampled token stays.
            end = start + num_new
            if sequence.status is running:
                sequence.num_computed_tokens = end
                if sequence.num_in_flight:
                    sequence.num_in_flight -= num_new
                if end >= sequence.commit_at:
                    self.block_manager.commit_full_blocks(sequence)
            # 3. What a prompt was computed for, other than its next token.
            if result.prompt_logprobs and row in result.prompt_logprobs:
                take_prompt_logprobs(sequence, start, result.prompt_logprobs[row])
            if result.embeddings and row in result.embeddings:
                outputs.append(embedding_output(sequence, result.embeddings[row], now))
                self._release(sequence)
            if token_id is None:
                continue
            # 4. The token, in the place of the one that stood as unknown if the step was in flight.
            if end < len(sequence.token_ids):
                sequence.token_ids[end] = token_id
            else:
                sequence.token_ids.append(token_id)
            # 5. The output, by the short way if it is a token and nothing else.
            if (
                sequence.first_token_time is not None
                and token_id not in sequence.stop_ids
                and end + 1 < sequence.stop_at
                and not (logprobs and row in logprobs)
            ):
                outputs.append(one_token(sequence.request.request_id, sequence.choice, token_id))
            else:
                final = token_output(sequence, end + 1, logprobs.get(row), now)
                self._report(final, sequence, outputs)
        if self._beams:
            self._advance_beams(now)
        self._outputs = []
        return outputs

    def _report(
        self, output: SequenceOutput, sequence: Sequence, outputs: list[SequenceOutput]
    ) -> None:
        """Add an output to those of the step, and release its sequence if it is the last one."""
        if output.finish_reason:
            if self._drafting is not None:
                output = output._replace(predicted=self._drafting.predicted(sequence))
            self._release(sequence)
        outputs.append(output)

    def _advance_beams(self, now: float) -> None:
        """Let beam groups take their steps, and report and release those that end."""
        for group in self._beams.advance(now):
            first = group.sequences[0]
            if group.error is not None:
                self._fail(first, group.error, poisoned=True)
                continue
            self._outputs.extend(group.outputs(now))
            for member in self._beams.remove(first):
                self._release(member)

    def stats(self) -> EngineStats:
        """Return a snapshot of the gauges and counters."""
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
            preemptions=self._planner.preemptions,
            blocks_copied=self.block_manager.blocks_copied,
            blocks_shared=self.block_manager.blocks_shared,
            waiting_tokens=self._planner.waiting_tokens(self.last_plan),
            **self._roster.adapters.stats(),
            **({} if self._drafting is None else self._drafting.counts()),
        )
