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
_AS_GOOD = 0.6
"""Share of the draft model's acceptance from which on a drafter that costs nothing is preferred."""


class RowDraft(NamedTuple):
    """A draft for one row of a step. `source` is the drafter that made it, or that will: a draft of
    UNKNOWN_TOKENs is the draft model's."""

    row: int
    token_ids: list[int]
    source: Drafter


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
        """`model` drafts if the others have nothing, or nothing that is right as often."""
        self.counts = SpeculationCounts()
        self.cost = cost or StepCost()
        self._drafters = drafters
        self._model = model
        self._max_draft = max_draft
        self._max_tokens = min(max_samples, MAX_TOKENS)
        self._acceptances: dict[int, Acceptance] = {}
        self._sources: dict[int, Drafter] = {}
        """The drafter of each row's draft that is being verified, by seq_id."""

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
        drafts = [draft for row, sequence in rows if (draft := self._propose(row, sequence))]
        sequences = dict(rows)
        # 2. The chance of each token to be accepted: a product along its draft.
        chances: list[tuple[float, int, int]] = []
        for index, draft in enumerate(drafts):
            rate = self._rate(sequences[draft.row], draft.source)
            places = range(1, len(draft.token_ids) + 1)
            chances += [(rate**place, index, -place) for place in places]
        chances.sort(reverse=True)
        # 3. As many of them, the likeliest first, as give most tokens for their time. That includes
        #    a pass of the draft model for each token of its longest draft.
        best, best_count, expected = _WORTHWHILE * num_tokens / self.cost(num_tokens), 0, 0.0
        most = min(self._max_tokens, max_tokens) - num_tokens
        passes, pass_cost = 0, 0.0
        if self._model is not None:
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
        chosen = []
        for draft, length in zip(drafts, lengths, strict=True):
            sequence = sequences[draft.row]
            if length:
                chosen.append(draft._replace(token_ids=draft.token_ids[:length]))
                self._sources[sequence.seq_id] = draft.source
            else:
                source = draft.source
                self._acceptance(sequence).skip(source.name, source.prior)
        return chosen

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> str:
        """Learn that `accepted` of the `drafted` tokens of a sequence's draft were right. Returns
        the name of the drafter that made it."""
        source = self._sources.pop(sequence.seq_id)
        self._acceptance(sequence).observe(source.name, source.prior, drafted, accepted)
        self.counts.add(drafted, accepted)
        return source.name

    def forget(self, seq_id: int) -> None:
        """Drop what is kept for a sequence that has ended."""
        self._acceptances.pop(seq_id, None)
        self._sources.pop(seq_id, None)
        for drafter in self._drafters:
            drafter.forget(seq_id)

    def _propose(self, row: int, sequence: Sequence) -> RowDraft | None:
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
        if draft is not None and self._rate(sequence, draft.source) >= _AS_GOOD * self._rate(
            sequence, model
        ):
            return draft
        return RowDraft(row, model.propose(sequence, k), model)

    def _acceptance(self, sequence: Sequence) -> Acceptance:
        return self._acceptances.setdefault(sequence.seq_id, Acceptance())

    def _rate(self, sequence: Sequence, source: Drafter) -> float:
        return self._acceptance(sequence).rate(source.name, source.prior)
