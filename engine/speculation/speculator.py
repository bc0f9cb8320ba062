"""Chooses the drafts of a step: as many tokens as are expected to save more than they cost."""

from __future__ import annotations

from collections import abc
from typing import NamedTuple

from ..sequence import Sequence
from ..step import UNKNOWN_TOKEN
from .acceptance import Acceptance
from .drafter import Drafter
from .model import ModelDrafter
from .step_cost import MAX_TOKENS, StepCost

MAX_POSITIONS = 32
"""Positions of a draft of which acceptance is counted."""
_WORTHWHILE = 1.02
"""Expected tokens a second, against those without drafts, from which on drafts are made."""


class RowDraft(NamedTuple):
    """A draft for one row of a step. `source` is the drafter that made it, or that will: a draft of
    UNKNOWN_TOKENs is the draft model's."""

    row: int
    token_ids: list[int]
    source: Drafter
    passed_over: RowDraft | None = None
    """A draft that cost nothing, in whose place the draft model's is expected to save more."""


class SpeculationCounts:
    """Counters since the engine's start, named as vLLM names its metrics."""

    def __init__(self) -> None:
        self.num_drafts = 0
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self.accepted_per_position = [0] * MAX_POSITIONS

    def add(self, drafted: int, accepted: int) -> None:
        """Count a draft that was verified."""
        self.num_drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        for position in range(min(accepted, MAX_POSITIONS)):
            self.accepted_per_position[position] += 1


class Speculator:
    """Asks drafters, in their order, and learns from what was accepted.

    `max_draft` bounds a draft, `max_samples` the sampled positions of a step.
    """

    def __init__(
        self,
        drafters: abc.Sequence[Drafter],
        *,
        max_draft: int,
        max_samples: int,
        cost: StepCost | None = None,
        model: ModelDrafter | None = None,
    ) -> None:
        """`model` drafts if the others have nothing, or if that is expected to save more."""
        self.counts = SpeculationCounts()
        self.cost = cost or StepCost()
        self._drafters = drafters
        self._model = model
        self._max_draft = max_draft
        self._max_tokens = min(max_samples, MAX_TOKENS)
        self._acceptances: dict[int, Acceptance] = {}
        self._sources: dict[int, Drafter] = {}
        """The drafter of each row's draft that is being verified, by seq_id."""
        self._passed_over: dict[int, RowDraft] = {}
        """The drafts that were passed over in the same step, by seq_id."""

    def may_pay(self, num_tokens: int) -> bool:
        """Whether one more token, were it sure to be right, would shorten a step of `num_tokens`
        tokens by more than it costs."""
        if not 0 < num_tokens < self._max_tokens:
            return False
        gain = (num_tokens + 1) / num_tokens
        return gain >= _WORTHWHILE * self.cost(num_tokens + 1) / self.cost(num_tokens)

    def choose(
        self, rows: list[tuple[int, Sequence]], num_tokens: int, max_tokens: int
    ) -> list[RowDraft]:
        """Return drafts for some of these rows of a step, each with a sequence that has one known
        token left to compute.

        The step has `num_tokens` tokens, which are all decodes, and may have `max_tokens`.
        """
        if not self.may_pay(num_tokens):
            return []
        # 1. What the drafters propose.
        sequences = dict(rows)
        proposed = (self._propose(row, sequence, num_tokens) for row, sequence in rows)
        drafts = [draft for draft in proposed if draft is not None]
        # 2. How much of each to verify.
        most = min(self._max_tokens, max_tokens) - num_tokens
        lengths = self._lengths(drafts, sequences, num_tokens, most)
        chosen = []
        for draft, length in zip(drafts, lengths, strict=True):
            sequence = sequences[draft.row]
            if length:
                chosen.append(draft._replace(token_ids=draft.token_ids[:length]))
                self._sources[sequence.seq_id] = draft.source
                self._passed_over.pop(sequence.seq_id, None)
                if draft.passed_over is not None:
                    self._passed_over[sequence.seq_id] = draft.passed_over
            else:
                source = draft.source
                self._acceptance(sequence).skip(source.name, source.prior)
        return chosen

    def _lengths(
        self,
        drafts: list[RowDraft],
        sequences: abc.Mapping[int, Sequence],
        num_tokens: int,
        most: int,
    ) -> list[int]:
        """Return how many tokens of each draft to verify, at most `most` in all, in a step of
        `num_tokens` tokens without them."""
        # 1. The chance of each token to be accepted: a product along its draft.
        chances: list[tuple[float, int, int]] = []
        for index, draft in enumerate(drafts):
            rate = self._rate(sequences[draft.row], draft.source)
            places = range(1, len(draft.token_ids) + 1)
            chances += [(rate**place, index, -place) for place in places]
        chances.sort(reverse=True)
        # 2. As many of them, the likeliest first, as give most tokens for their time. That includes
        #    a pass of the draft model for each token of its longest draft.
        best, best_count, expected = _WORTHWHILE * num_tokens / self.cost(num_tokens), 0, 0.0
        passes, pass_cost = 0, 0.0
        if self._model is not None:
            self.cost.forget_passes()
            pass_cost = self.cost.draft_pass(sum(one.source is self._model for one in drafts))
        for count, (chance, index, place) in enumerate(chances[:most], 1):
            expected += chance
            if drafts[index].source is self._model:
                passes = max(passes, -place)
            speed = (num_tokens + expected) / (self.cost(num_tokens + count) + passes * pass_cost)
            if speed > best:
                best, best_count = speed, count
        lengths = [0] * len(drafts)
        for _, index, _ in chances[:best_count]:
            lengths[index] += 1
        return lengths

    def verified(self, sequence: Sequence, drafted: int, tokens: list[int]) -> str:
        """Learn that a draft of `drafted` tokens brought these: the right ones, and one more.
        Returns the name of the drafter that made it."""
        source, accepted = self._sources.pop(sequence.seq_id), len(tokens) - 1
        acceptance = self._acceptance(sequence)
        acceptance.observe(source.name, source.prior, drafted, accepted)
        other = self._passed_over.pop(sequence.seq_id, None)
        if other is not None:
            pairs = zip(other.token_ids, tokens, strict=False)
            same = [token_id == sampled for token_id, sampled in pairs]
            right = same.index(False) if False in same else len(same)
            acceptance.learn(other.source.name, other.source.prior, len(same), right)
        self.counts.add(drafted, accepted)
        return source.name

    def forget(self, seq_id: int) -> None:
        """Drop what is kept for a sequence that has ended."""
        self._acceptances.pop(seq_id, None)
        self._sources.pop(seq_id, None)
        self._passed_over.pop(seq_id, None)
        for drafter in self._drafters:
            drafter.forget(seq_id)

    def _propose(self, row: int, sequence: Sequence, num_tokens: int) -> RowDraft | None:
        # At least one token is left to sample after the draft.
        room = sequence.stop_at - len(sequence.token_ids) - 1
        if sequence.reasoning is not None:
            room = min(room, sequence.reasoning.num_drafts(sequence.num_output_tokens))
        k = min(self._acceptance(sequence).length, self._max_draft, room)
        if k < 1 or sequence.token_ids[-1] == UNKNOWN_TOKEN:
            return None
        draft: RowDraft | None = None
        for drafter in self._drafters:
            token_ids = drafter.propose(sequence, k)
            if token_ids:
                draft = RowDraft(row, token_ids[:k], drafter)
                break
        model = self._model
        if model is None:
            return draft
        if draft is None:
            return RowDraft(row, model.propose(sequence, k), model)
        best = self._speed(sequence, draft.source, len(draft.token_ids), num_tokens)
        if best >= self._speed(sequence, model, k, num_tokens):
            return draft
        return RowDraft(row, model.propose(sequence, k), model, draft)

    def _speed(self, sequence: Sequence, source: Drafter, k: int, num_tokens: int) -> float:
        """Return the expected tokens a second of a row with its best draft of up to `k` tokens, if
        all rows of the step had such drafts; the unit is arbitrary."""
        cost = self.cost(num_tokens)
        each = self.cost(num_tokens + 1) - cost
        if source is self._model:
            each += self.cost.draft_pass(num_tokens) / num_tokens
        rate, expected, best = self._rate(sequence, source), 1.0, 0.0
        for place in range(1, k + 1):
            expected += rate**place
            best = max(best, expected / (cost / num_tokens + place * each))
        return best

    def _acceptance(self, sequence: Sequence) -> Acceptance:
        return self._acceptances.setdefault(sequence.seq_id, Acceptance())

    def _rate(self, sequence: Sequence, source: Drafter) -> float:
        return self._acceptance(sequence).rate(source.name, source.prior)
