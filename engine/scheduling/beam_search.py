"""Beam search: the likeliest continuations of a prompt, kept by forking block tables.

A request of width w has w sequences. One of them computes the prompt; from then on each step takes
the best candidates of all live beams, by the sum of their tokens' log-probabilities:

    A ── a ──▶ stays in A's blocks                    first child of a beam: same sequence
      └─ b ──▶ fork: A's blocks, the tail by          other children: a sequence without a child
               copy-on-write
    B          no candidate among the best: its blocks go back at once

A step counts once all live beams have their candidates; those that come first wait. Memory is
shared as the beams' ancestry is: common blocks once. To keep that through a preemption a group goes
and comes as one: all its beams give their blocks back, one of them computes what they have in
common, the others fork from it there (`Sequence.held_forks`) and compute the rest.

Scores, length penalty and the three ways to stop early are those of transformers'
`GenerationMixin._beam_search`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from operator import attrgetter
from os.path import commonprefix
from typing import NamedTuple

from ..cache.block_manager import BlockManager
from ..outputs import (
    FinishReason,
    ModelRunnerOutput,
    RowError,
    SchedulerOutput,
    SequenceOutput,
    TokenLogprobs,
)
from ..sequence import Sequence, SequenceStatus
from .sequence_outputs import prompt_logprobs, stop_reason, timings
from .waiting_queue import WaitingQueue


class Candidate(NamedTuple):
    """One token more behind `parent`; `place` is where it stands among the parent's best."""

    score: float
    """Sum of the log-probabilities of all its tokens."""
    parent: Sequence
    token_id: int
    place: int


class Hypothesis(NamedTuple):
    """A finished continuation; `score` has the length penalty applied."""

    score: float
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason
    stop_reason: int | None


class BeamGroup:
    """The beams of one request. `beams` are live, best first; `spares` wait to become one."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.beams = sequences[:1]
        self.spares = sequences[1:]
        self.params = sequences[0].request.sampling_params
        self.width = len(sequences)
        self.scores: dict[Sequence, float] = {self.beams[0]: 0.0}
        self.entries: dict[Sequence, list[TokenLogprobs]] = {self.beams[0]: []}
        """Log-probabilities of each beam's tokens, where the request wants them."""
        self.found: dict[Sequence, TokenLogprobs] = {}
        """What each beam's step brought; complete, it is the group's next step."""
        self.finished: list[Hypothesis] = []
        self.error: RowError | None = None
        self.preempted = False

    @property
    def num_running(self) -> int:
        return sum(s.status is SequenceStatus.RUNNING for s in self.sequences)

    def choose(self) -> list[Candidate]:
        """Take the step's hypotheses from its candidates; the beams to go on with, best first."""
        length = self.beams[0].num_output_tokens + 1
        at_end = length >= self.params.max_tokens
        going_on: list[Candidate] = []
        for rank, candidate in enumerate(self._candidates(length)):
            stops = candidate.token_id in candidate.parent.stop_ids
            if not stops and not at_end:
                going_on.append(candidate)
                if len(going_on) == self.width:
                    break
            elif rank < self.width:
                self.finished.append(self._hypothesis(candidate, length, stops))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self.width :]
        return [] if at_end or self._is_done(length, going_on) else going_on

    def _candidates(self, length: int) -> list[Candidate]:
        """All that could be among the best, in order. Of each beam that is its best `width`, and
        as many more as there are stop tokens among them; of equals the better beam's first."""
        too_early = length <= self.params.min_tokens
        candidates = [
            Candidate(self.scores[beam] + logprob, beam, token_id, place)
            for beam in self.beams
            for place, (token_id, logprob) in enumerate(
                zip(self.found[beam].top_token_ids, self.found[beam].top_logprobs, strict=True)
            )
            if not (too_early and token_id in beam.stop_ids)
        ]
        return sorted(candidates, key=lambda candidate: -candidate.score)

    def _hypothesis(self, candidate: Candidate, length: int, stops: bool) -> Hypothesis:
        parent, token_id = candidate.parent, candidate.token_id
        return Hypothesis(
            self._penalised(candidate.score, length),
            [*parent.token_ids[parent.num_prompt_tokens :], token_id],
            self._entries_with(candidate),
            "stop" if stops else "length",
            stop_reason(parent, token_id) if stops else None,
        )

    def _entries_with(self, candidate: Candidate) -> list[TokenLogprobs]:
        wanted = self.params.logprobs
        if wanted is None:
            return []
        _, _, _, top_ids, top = self.found[candidate.parent]
        logprob = top[candidate.place]
        entry = TokenLogprobs(
            candidate.token_id,
            logprob,
            top.index(logprob) + 1,
            top_ids[:wanted],
            top[:wanted],
        )
        return [*self.entries[candidate.parent], entry]

    def _is_done(self, length: int, going_on: list[Candidate]) -> bool:
        """Whether no live beam is expected to better the finished ones."""
        if not going_on:
            return True
        if len(self.finished) < self.width:
            return False
        params = self.params
        if params.early_stopping is True:
            return True
        if params.early_stopping == "never" and params.length_penalty > 0.0:
            length = params.max_tokens
        return self._penalised(going_on[0].score, length) <= self.finished[-1].score

    def _penalised(self, score: float, length: int) -> float:
        divisor: float = length**self.params.length_penalty
        return score / divisor

    def outputs(self, now: float) -> Iterator[SequenceOutput]:
        """The n best, all at once."""
        first = self.sequences[0]
        for choice, best in enumerate(self.finished[: self.params.n]):
            yield SequenceOutput(
                first.request.request_id,
                choice,
                best.token_ids,
                logprobs=best.logprobs if self.params.logprobs is not None else None,
                prompt_logprobs=None if choice else prompt_logprobs(first),
                finish_reason=best.finish_reason,
                stop_reason=best.stop_reason,
                num_cached_tokens=first.num_cached_tokens,
                timings=timings(first, now),
            )


class BeamSearch:
    """The beam groups of a scheduler, on whose collections it works: `running` (sorted by rank),
    `waiting`, and `released`, the seq_ids whose rows the worker may drop."""

    def __init__(
        self,
        block_manager: BlockManager,
        running: list[Sequence],
        waiting: WaitingQueue,
        released: list[int],
    ) -> None:
        self._block_manager = block_manager
        self._running = running
        self._waiting = waiting
        self._released = released
        self._groups: dict[str, BeamGroup] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, sequences: list[Sequence]) -> None:
        self._groups[sequences[0].request.request_id] = BeamGroup(sequences)
        self._waiting.push(sequences[0])

    def group_of(self, sequence: Sequence) -> BeamGroup | None:
        return self._groups.get(sequence.request.request_id)

    def seats_reserved(self) -> int:
        """Of max_num_seqs, those kept for beams that are still to fork from a running one."""
        return sum(
            group.width - num_running
            for group in self._groups.values()
            if (num_running := group.num_running)
        )

    def remove(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that end with this one: all of its group, which is forgotten."""
        group = self._groups.pop(sequence.request.request_id, None)
        if group is None:
            return [sequence]
        for member in group.sequences:
            member.held_forks = []
        return group.sequences

    def take(self, output: SchedulerOutput, result: ModelRunnerOutput) -> ModelRunnerOutput:
        """Keep what the step brought to beams; the rest of the result, for the others."""
        token_ids, errors = list(result.token_ids), dict(result.errors)
        for row, sequence in enumerate(output.sequences):
            group = self.group_of(sequence)
            if group is None or sequence.status is SequenceStatus.FINISHED:
                continue
            if row in errors:
                group.error = errors.pop(row)
            elif token_ids[row] is not None:
                group.found[sequence] = result.logprobs[row]
            token_ids[row] = None
        return result._replace(token_ids=token_ids, errors=errors)

    def advance(self, now: float) -> list[BeamGroup]:
        """Let every complete group take its step; those that have ended."""
        ended = []
        for group in self._groups.values():
            if group.error is not None:
                ended.append(group)
            elif group.preempted:
                self._park(group)
            elif len(group.found) == len(group.beams):
                if group.sequences[0].first_token_time is None:
                    group.sequences[0].first_token_time = now
                chosen = group.choose()
                if not chosen:
                    ended.append(group)
                else:
                    self._continue(group, chosen)
        return ended

    def _continue(self, group: BeamGroup, chosen: list[Candidate]) -> None:
        """Make the chosen candidates the live beams."""
        parents = {candidate.parent for candidate in chosen}
        for beam in group.beams:
            if beam not in parents:  # before the forks, which its sequence may serve
                self._drop(beam)
                group.spares.append(beam)
        entries = [group._entries_with(candidate) for candidate in chosen]
        beams: list[Sequence] = []
        for candidate in chosen:
            beam = candidate.parent
            if beam in beams:  # it is its first child already
                beam = self._fork(candidate.parent, group.spares.pop())
            beams.append(beam)
        for beam, candidate in zip(beams, chosen, strict=True):
            beam.token_ids.append(candidate.token_id)
        group.beams = beams
        group.scores = {b: candidate.score for b, candidate in zip(beams, chosen, strict=True)}
        group.entries = dict(zip(beams, entries, strict=True))
        group.found = {}

    def _fork(self, parent: Sequence, child: Sequence) -> Sequence:
        child.token_ids = list(parent.token_ids)
        self._block_manager.fork(parent, child)
        child.status = SequenceStatus.RUNNING
        child.rank = parent.rank._replace(choice=child.choice)
        insort(self._running, child, key=attrgetter("rank"))
        return child

    def _drop(self, beam: Sequence) -> None:
        """Give a running beam's blocks and its row back."""
        self._running.remove(beam)
        self._released.append(beam.seq_id)
        self._block_manager.free(beam)
        beam.status = SequenceStatus.WAITING

    def _park(self, group: BeamGroup) -> None:
        """One of the beams was preempted: all wait, and come back sharing what they have in
        common."""
        for beam in group.beams:
            if beam.status is SequenceStatus.RUNNING:
                self._drop(beam)
            beam.held_forks = []
        leader, *others = sorted(group.beams, key=attrgetter("choice"))
        leader.held_forks = others
        leader.fork_at = _common_length(group.beams)
        group.found = {}
        group.preempted = False
        self._waiting.push(leader)


def _common_length(beams: Iterable[Sequence]) -> int:
    """Tokens that all begin with. Beams are of one length and differ, so that each has a token
    left to compute; a single beam forks nothing."""
    return len(commonprefix([beam.token_ids for beam in beams]))
