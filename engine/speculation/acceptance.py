"""How far the drafts of each sequence were right: the basis of how long the next ones are."""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST_LENGTH = 4
"""Tokens of a sequence's first draft."""
_MEMORY = 0.8
"""Weight of what was known of a drafter before a token of its drafts is verified."""
_RECOVERY = 0.02
"""Share of the way back to the prior that an unused chance brings, so that a drafter which was
wrong is tried again after a while."""


@dataclass(slots=True)
class Acceptance:
    """What is known of one sequence's drafts.

    `length` is the longest draft to make: it doubles when a whole draft was right, and otherwise
    is one more than the tokens that were. `rates` are, by drafter, the estimated probabilities that
    a draft's next token is right, given that those before it are.
    """

    length: int = FIRST_LENGTH
    rates: dict[str, float] = field(default_factory=dict)

    def rate(self, name: str, prior: float) -> float:
        """Return the estimate for a drafter; `prior` before anything is known."""
        return self.rates.get(name, prior)

    def observe(self, name: str, prior: float, drafted: int, accepted: int) -> None:
        """Learn that `accepted` of `drafted` tokens were right."""
        self.learn(name, prior, drafted, accepted)
        self.length = 2 * self.length if accepted == drafted else accepted + 1

    def learn(self, name: str, prior: float, drafted: int, accepted: int) -> None:
        """Learn the same of a draft that was not verified, since another one was: what it proposed
        is compared with the tokens that came."""
        tried = accepted + (accepted < drafted)  # tokens after the first wrong one say nothing
        before = self.rate(name, prior)
        for right in range(tried):
            before = _MEMORY * before + (1 - _MEMORY) * (right < accepted)
        self.rates[name] = before

    def skip(self, name: str, prior: float) -> None:
        """Learn that a draft was not worth its cost."""
        before = self.rate(name, prior)
        self.rates[name] = before + _RECOVERY * (prior - before)
