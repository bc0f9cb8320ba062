"""Beam search: the likeliest continuations of a prompt, kept by forking block tables.

Theory of operation. A request of width w has w sequences. One of them computes the prompt. From
then on each of the group's steps takes the best candidates of all live beams, by the sum of their
tokens' log-probabilities:

    A ── a ──▶ stays in A's blocks                  first child of a beam: the same sequence
      └─ b ──▶ fork: A's blocks, the tail by        other children: a spare sequence
               copy-on-write
    B          no candidate among the best: its blocks go back at once, it becomes a spare

The engine's steps do not wait for a group. A beam whose candidates have arrived sits out until all
live beams have theirs (`found`); then the group takes its step (`advance`). A candidate that ends
(stop token, or max_tokens) becomes a hypothesis; the group ends when no live beam is expected to
beat its w best hypotheses.

Memory is shared as the beams' ancestry is: common blocks are held once. To keep that through a
preemption, a group goes and comes as one. All its beams give their blocks back, one of them (the
leader) computes what they have in common, the others fork from it there (`Sequence.held_forks`)
and compute the rest.

Scores, length penalty and the three ways to stop early are those of transformers'
`GenerationMixin._beam_search`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter
from os.path import commonprefix
from typing import NamedTuple

from ..cache.block_manager import BlockManager
from ..outputs import FinishReason, RowError, SequenceOutput, TokenLogprobs
from ..sequence import Sequence, SequenceStatus
from ..step import ModelRunnerOutput
from .policy import Policy
from .roster import Roster
from .sequence_outputs import prompt_logprobs, stop_reason, timings


class Candidate(NamedTuple):
    """A beam extended by one token; `place` is the token's index among the parent's best."""

    score: float
    """Sum of the log-probabilities of all tokens."""
    parent: Sequence
    token_id: int
    place: int


class Hypothesis(NamedTuple):
    """A finished continuation. The length penalty is applied to its `score`."""

    score: float
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason
    stop_reason: int | None


class BeamGroup:
    """The beams of one request. `beams` are live, best first; `spares` wait to become beams."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.beams = sequences[:1]
        self.spares = sequences[1:]
        self.params = sequences[0].request.sampling_params
        self.width = len(sequences)
        self.scores: dict[Sequence, float] = {self.beams[0]: 0.0}
        self.entries: dict[Sequence, list[TokenLogprobs]] = {self.beams[0]: []}
        """Log-probabilities of each beam's tokens, if the request wants them."""
        self.found: dict[Sequence, TokenLogprobs] = {}
        """Each beam's candidates, as they arrive. Once complete, the group takes its step."""
        self.finished: list[Hypothesis] = []
        self.error: RowError | None = None
        self.preempted = False

    @property
    def num_running(self) -> int:
        """Sequences of the group that hold blocks."""
        return sum(s.status is SequenceStatus.RUNNING for s in self.sequences)

    def choose(self) -> list[Candidate]:
        """Record the candidates that end; return those to continue with, best first."""
        length = self.beams[0].num_output_tokens + 1
        at_end = length >= self.params.max_tokens
        # 1. Walk the candidates from the best on, until the width is filled with ones that go on.
        #    Of those that end, only the ones among the best `width` count, as in transformers.
        going_on: list[Candidate] = []
        for rank, candidate in enumerate(self._candidates(length)):
            stops = candidate.token_id in candidate.parent.stop_ids
            if not stops and not at_end:
                going_on.append(candidate)
                if len(going_on) == self.width:
                    break
            elif rank < self.width:
                self.finished.append(self._hypothesis(candidate, length, stops))
        # 2. Keep the best hypotheses of all steps.
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self.width :]
        # 3. End, or go on.
        return [] if at_end or self._is_done(length, going_on) else going_on

    def _candidates(self, length: int) -> list[Candidate]:
        """Return all candidates that could be among the best, in order.

        A beam contributes its best `width` tokens, and as many more as there are stop tokens. Of
        equal scores the better beam's comes first.
        """
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
        _, _, _, top_ids, top, named = self.found[candidate.parent]
        logprob = top[candidate.place]
        entry = TokenLogprobs(
            candidate.token_id,
            logprob,
            top.index(logprob) + 1,
            top_ids[:wanted],
            top[:wanted],
            named,
        )
        return [*self.entries[candidate.parent], entry]

    def _is_done(self, length: int, going_on: list[Candidate]) -> bool:
        """Decide whether no live beam is expected to beat the finished hypotheses."""
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
        """Yield the outputs of the n best hypotheses, all at once."""
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
    """The beam groups of a scheduler, with whose roster and policy it works."""

    def __init__(self, block_manager: BlockManager, roster: Roster, policy: Policy) -> None:
        self._block_manager = block_manager
        self._roster = roster
        self._policy = policy
        self._groups: dict[str, BeamGroup] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, sequences: list[Sequence]) -> None:
        """Queue a request's beams; the first computes the prompt."""
        self._groups[sequences[0].request.request_id] = BeamGroup(sequences)
        self._policy.push(sequences[0])

    def group_of(self, sequence: Sequence) -> BeamGroup | None:
        """Return the group of a beam; None for other sequences."""
        return self._groups.get(sequence.request.request_id)

    def seats_reserved(self) -> int:
        """Return how many of max_num_seqs are kept for beams that have yet to be forked."""
        return sum(
            group.width - num_running
            for group in self._groups.values()
            if (num_running := group.num_running)
        )

    def remove(self, sequence: Sequence) -> list[Sequence]:
        """Return the sequences that end with this one: its whole group, which is forgotten."""
        group = self._groups.pop(sequence.request.request_id, None)
        if group is None:
            return [sequence]
        for member in group.sequences:
            member.held_forks = []
        return group.sequences

    def take(self, rows: list[Sequence], result: ModelRunnerOutput) -> ModelRunnerOutput:
        """Keep what a step's result says of beams, and return the result without it."""
        token_ids, errors = list(result.token_ids), dict(result.errors)
        for row, sequence in enumerate(rows):
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
        """Let every group whose candidates are complete take its step; return those that ended."""
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
        # 1. Beams without a child give their blocks back, and may serve the forks as spares.
        parents = {candidate.parent for candidate in chosen}
        for beam in group.beams:
            if beam not in parents:
                self._drop(beam)
                group.spares.append(beam)
        # 2. A parent's first child stays in its sequence; the others are forked from it before
        #    any of them gets its token.
        entries = [group._entries_with(candidate) for candidate in chosen]
        beams: list[Sequence] = []
        for candidate in chosen:
            beam = candidate.parent
            if beam in beams:  # its first child has it
                beam = self._fork(candidate.parent, group.spares.pop())
            beams.append(beam)
        # 3. Append the tokens.
        for beam, candidate in zip(beams, chosen, strict=True):
            beam.token_ids.append(candidate.token_id)
        group.beams = beams
        group.scores = {b: candidate.score for b, candidate in zip(beams, chosen, strict=True)}
        group.entries = dict(zip(beams, entries, strict=True))
        group.found = {}

    def _fork(self, parent: Sequence, child: Sequence) -> Sequence:
        child.token_ids = list(parent.token_ids)
        self._block_manager.fork(parent, child)
        child.rank = parent.rank._replace(choice=child.choice)
        self._roster.add(child)
        return child

    def _drop(self, beam: Sequence) -> None:
        """Give a running beam's blocks and its row back."""
        self._roster.remove(beam, SequenceStatus.WAITING)
        self._block_manager.free(beam)

    def _park(self, group: BeamGroup) -> None:
        """Let all beams wait, since one of them was preempted. They will come back sharing what
        they have in common."""
        for beam in group.beams:
            if beam.status is SequenceStatus.RUNNING:
                self._drop(beam)
            beam.held_forks = []
        leader, *others = sorted(group.beams, key=attrgetter("choice"))
        leader.held_forks = others
        leader.fork_at = _common_length(group.beams)
        group.found = {}
        group.preempted = False
        self._policy.push(leader)


def _common_length(beams: Iterable[Sequence]) -> int:
    """Return the number of leading tokens that all beams share.

    Beams have one length and differ, so each has a token left to compute. A single beam forks
    nothing.
    """
    return len(commonprefix([beam.token_ids for beam in beams]))
