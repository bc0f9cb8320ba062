"""The protocol of whatever guesses the next tokens of a sequence."""

from __future__ import annotations

from typing import Protocol

from ..sequence import Sequence


class Drafter(Protocol):
    """Guesses how sequences go on. A wrong guess costs time and nothing else."""

    @property
    def name(self) -> str:
        """What the acceptance of its drafts is counted under."""

    @property
    def prior(self) -> float:
        """The share of its first tokens that is expected to be right before any was verified."""

    def propose(self, sequence: Sequence, k: int) -> list[int]:
        """Return up to `k` tokens that may follow the sequence's tokens, all of which are known.

        Ids must be of the vocabulary."""

    def forget(self, seq_id: int) -> None:
        """Drop what is kept for a sequence that has ended."""
