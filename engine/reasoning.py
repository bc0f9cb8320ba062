"""Where an answer's reasoning begins and ends, by its tokens alone, and its budget of tokens.

    answer:   opening  t  t  t  t  closing  …content…
                       └ reasoning ┘

A mark (`<think>`) may be one token or several, and may share a token with the text around it, so
marks are looked for in the bytes of the tokens. Only a few tokens of a vocabulary can be a part of
a mark; their bytes come with the request, and every other token just separates.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningSpec:
    """How a model marks its reasoning, and how many tokens of it an answer may have.

    `pieces` holds the bytes of the tokens that may be a part of a mark or consist of white space.
    White space may precede the opening mark at the beginning of an answer. If `begins_inside`, the
    answer begins with reasoning, and an opening mark may precede it. If `repeats`, reasoning may
    begin again at any opening mark; otherwise only the beginning of an answer counts.

    After `budget` tokens of reasoning the tokens `end` follow one after another, then one of
    `after_end` if there are any. None means no budget.
    """

    opening: bytes
    closings: tuple[bytes, ...]
    pieces: dict[int, bytes]
    begins_inside: bool = False
    repeats: bool = False
    budget: int | None = None
    end: tuple[int, ...] = ()
    after_end: tuple[int, ...] = ()

    @property
    def forced_ids(self) -> tuple[int, ...]:
        """The token ids that the budget may force."""
        return self.end + self.after_end if self.budget is not None else ()


class _State(enum.Enum):
    START = enum.auto()  # nothing but white space and a part of the opening mark so far
    INSIDE = enum.auto()
    OUTSIDE = enum.auto()


class ReasoningTracker:
    """Follows one answer: reads its tokens in order, counts those of the reasoning, and says which
    tokens the budget demands next. Its state depends on the tokens read and on nothing else."""

    def __init__(self, spec: ReasoningSpec) -> None:
        self._spec = spec
        self.num_read = 0
        """Tokens read so far."""
        self._num_inside = 0
        self._state = _State.START
        self._tail = b""
        """The bytes of the last tokens, as far as they may belong to a mark."""
        self._starts: list[int] = []
        """Where each token begins in `_tail`."""
        self._recent: list[int] = []
        """The last tokens of the reasoning, at most as many as `end` has."""
        self._demanded: list[tuple[int, ...]] = []
        """The tokens to choose from for each of the next positions."""
        self._longest = max(map(len, (spec.opening, *spec.closings)))

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens read so far that lie between the marks, without those of the marks. A token that
        holds a part of a closing mark and other text counts."""
        if self._state is _State.START:
            return len(self._starts) if self._spec.begins_inside else 0
        return self._num_inside

    @property
    def is_over(self) -> bool:
        """Whether no token that comes can matter any more."""
        over = self._state is _State.OUTSIDE and not self._spec.repeats
        return over and not self._demanded

    def num_drafts(self, num_output_tokens: int) -> int:
        """Return after how many guessed tokens the answer, which has `num_output_tokens`, may be
        sampled: after none of them can the budget demand a token, whatever they are."""
        if self.is_over or self._spec.budget is None:
            return sys.maxsize
        if self._demanded:
            return 0
        # Each token adds at most one to those of the reasoning.
        most = self.num_reasoning_tokens + num_output_tokens - self.num_read
        return max(0, self._spec.budget - most - 1)

    def read(self, token_ids: Iterable[int]) -> None:
        """Read the next tokens of the answer."""
        for token_id in token_ids:
            self.num_read += 1
            demanded, self._demanded = self._demanded, []
            if demanded and token_id in demanded[0]:
                self._demanded = demanded[1:]
            self._read(token_id)

    def demanded(self) -> tuple[int, ...] | None:
        """Return the tokens of which the next one must be one, or None if it is free."""
        spec = self._spec
        if not self._demanded:
            inside = self._state is _State.INSIDE
            inside |= self._state is _State.START and spec.begins_inside
            if spec.budget is None or not inside or self.num_reasoning_tokens < spec.budget:
                return None
            # The model may have begun the closing mark by itself; then that is completed.
            end = spec.end
            recent = tuple(self._recent)
            begun = next(n for n in reversed(range(len(end))) if not n or recent[-n:] == end[:n])
            self._demanded = [(token_id,) for token_id in end[begun:]]
            if spec.after_end:
                self._demanded.append(spec.after_end)
        return self._demanded[0]

    def _read(self, token_id: int) -> None:
        if self._state is _State.OUTSIDE and not self._spec.repeats:
            return
        data = self._spec.pieces.get(token_id)
        if self._spec.end:
            self._recent = [*self._recent, token_id][-len(self._spec.end) :]
        self._num_inside += self._state is _State.INSIDE
        # 1. A token that cannot be a part of a mark ends whatever mark has begun.
        if data is None:
            if self._state is _State.START:
                self._starts.append(0)
                self._begin_without_mark()
            self._tail, self._starts = b"", []
            return
        # 2. Any other token extends the tail, in which a mark may be complete now.
        self._starts.append(len(self._tail))
        self._tail += data
        if self._state is _State.START:
            text = self._tail.lstrip()
            if text.startswith(self._spec.opening):
                self._begin(text[len(self._spec.opening) :])
            elif not self._spec.opening.startswith(text):
                self._begin_without_mark()
        elif self._state is _State.OUTSIDE:
            _, mark, rest = self._tail.partition(self._spec.opening)
            if mark:
                self._begin(rest)
        if self._state is _State.INSIDE:
            self._look_for_closing()
        # 3. Drop the tokens at the tail's beginning that no mark can begin in any more.
        if self._state is _State.START:
            return  # they are counted
        while len(self._starts) > 1 and len(self._tail) - self._starts[1] >= self._longest - 1:
            cut = self._starts[1]
            self._tail = self._tail[cut:]
            self._starts = [start - cut for start in self._starts[1:]]

    def _begin(self, rest: bytes) -> None:
        """Begin the reasoning after an opening mark; its last token ends with the bytes `rest`."""
        self._state = _State.INSIDE
        self._tail, self._starts, self._recent = rest, [-1], []

    def _begin_without_mark(self) -> None:
        """Leave the start of an answer that no opening mark begins."""
        self._state = _State.OUTSIDE
        if self._spec.begins_inside:
            self._state = _State.INSIDE
            self._num_inside = len(self._starts)

    def _look_for_closing(self) -> None:
        found = [at for mark in self._spec.closings if (at := self._tail.find(mark)) >= 0]
        if found:
            at = min(found)
            self._state = _State.OUTSIDE
            # Tokens that begin within the mark are none of the reasoning's.
            self._num_inside -= sum(start >= at for start in self._starts)
            # The closing mark may begin the next opening mark.
            self._tail, self._starts, self._recent = self._tail[at:], [-1], []
