"""Drafters and costs for tests: right, wrong, mixed and absurd guesses, always worth their time."""

from __future__ import annotations

import random
from collections.abc import Callable

from quire.engine.sequence import Sequence
from quire.engine.speculation.speculator import Speculator
from quire.engine.speculation.step_cost import StepCost

Answers = Callable[[Sequence], list[int]]
"""Returns a sequence's whole output as it is without drafts."""


class FreeDrafts(StepCost):
    """A step costs the same however many tokens it has."""

    def __call__(self, tokens: int) -> float:
        return 1.0

    def draft_pass(self, rows: int) -> float:
        return 0.0

    def observe_passes(self, passes: int, rows: int, seconds: float) -> None:
        """Learn nothing."""

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn nothing."""


class RandomDrafter:
    """Guesses each next token rightly with a probability; the other guesses are random."""

    name = "random"
    prior = 0.9

    def __init__(self, answers: Answers, right: float, seed: int, vocab_size: int = 100) -> None:
        self._answers, self._right = answers, right
        self._random = random.Random(seed)
        self._vocab_size = vocab_size

    def propose(self, sequence: Sequence, k: int) -> list[int]:
        chance = self._random
        answer = self._answers(sequence)[sequence.num_output_tokens :]
        length = chance.randint(0, k)
        drafted = []
        for place in range(length):
            right = place < len(answer) and chance.random() < self._right
            drafted.append(answer[place] if right else chance.randrange(self._vocab_size))
        return drafted

    def forget(self, seq_id: int) -> None:
        """Keep nothing."""


def always(drafter: RandomDrafter, max_draft: int = 7) -> Speculator:
    """Return a speculator that verifies every draft."""
    return Speculator([drafter], max_draft=max_draft, max_samples=64, cost=FreeDrafts())
