"""Drafts from a grammar: tokens that it leaves no choice about, such as the keys of a schema."""

from __future__ import annotations

from collections.abc import Callable

from ..sequence import Sequence


class GrammarDrafter:
    """Asks the grammar that a sequence follows for its forced tokens.

    They are a guess like any other: the model may spell the same text in other tokens.
    """

    name = "grammar"
    prior = 0.9

    def __init__(self, forced: Callable[[Sequence, int], list[int]]) -> None:
        """`forced` returns up to so many tokens that the sequence's grammar forces."""
        self._forced = forced

    def propose(self, sequence: Sequence, k: int) -> list[int]:
        return self._forced(sequence, k) if sequence.request.grammar is not None else []

    def forget(self, seq_id: int) -> None:
        """Do nothing: nothing is kept."""
