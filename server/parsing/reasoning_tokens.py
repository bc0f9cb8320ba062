"""Counts the tokens of a choice that are reasoning, including the mark that ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from .harmony import ANALYSIS, CALL, END, RETURN
from .reasoning import CLOSE, OPEN, ReasoningStyle


class _Marks(NamedTuple):
    """The texts that begin and end reasoning."""

    open: bytes
    close: tuple[bytes, ...]
    anywhere: bool
    """Reasoning may begin anywhere and several times, and not only once at the beginning."""


_THINK = _Marks(OPEN.encode(), (CLOSE.encode(),), False)
_HARMONY = _Marks(ANALYSIS.encode(), (END.encode(), CALL.encode(), RETURN.encode()), True)


class ReasoningCounter:
    """Counts the tokens of one choice up to the one with which the reasoning ends.

    `opened` says that the answer begins inside the reasoning.
    """

    def __init__(
        self, style: ReasoningStyle, token_bytes: Callable[[int], bytes], *, opened: bool
    ) -> None:
        self.count = 0
        self._marks = _HARMONY if style == "openai_gptoss" else _THINK
        self._token_bytes = token_bytes
        self._inside = opened
        self._done = False
        self._num_undecided = 0
        """Tokens at the beginning that may become the opening mark."""
        self._tail = b""

    def feed(self, token_ids: Iterable[int]) -> None:
        """Count the next tokens."""
        if self._done:
            return
        for token_id in token_ids:
            self._tail += self._token_bytes(token_id)
            if self._inside:
                self._read_inside()
            else:
                self._read_outside()

    def _read_inside(self) -> None:
        self.count += 1
        marks = self._marks
        if any(mark in self._tail for mark in marks.close):
            self._inside, self._done, self._tail = False, not marks.anywhere, b""
        else:
            self._tail = self._tail[-max(map(len, marks.close)) :]

    def _read_outside(self) -> None:
        if self._done:
            return
        marks = self._marks
        self._num_undecided += 1
        if marks.anywhere:
            self._inside = marks.open in self._tail
            self._tail = self._tail[-len(marks.open) :]
            self._num_undecided = 1
        else:
            begun = self._tail.lstrip()
            self._inside = begun.startswith(marks.open)
            self._done = not (self._inside or marks.open.startswith(begun))
        if self._inside:
            self.count += self._num_undecided
            self._tail = b""
