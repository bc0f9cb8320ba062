"""Structured output: which tokens each constrained sequence may sample next.

    a request arrives ─▶ a thread compiles its grammar; it waits in the queue until that is done
    step:  schedule ─▶ start ──▶ forward ──▶ wait for the bitmask ─▶ sample ─▶ update
                         └─ a thread: read the last tokens, fill the rows ┘
    one step ahead of the results:
           schedule ─▶ forward ─▶ the last step's results ─▶ start ─▶ wait ─▶ sample

A matcher follows the output of one choice. It reads the tokens that it has not read yet. So a fork
(made before the first output token), a preemption (which keeps the tokens) and a step that was
given up need no special case, and a new matcher catches up by itself.

The end of a grammar ends the answer: then only end-of-sequence is allowed. min_tokens and
ignore_eos bar an end token as long as the grammar allows anything else, and no longer.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict, abc
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import GrammarError, InvalidRequestError
from ..outputs import RowError, SequenceOutput
from ..request import GrammarSpec, Request
from ..sequence import ReadingRow, Sequence
from . import slow_rows
from .compile import compile_grammar, is_available, make_tokenizer, matcher_failure

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

MAX_CACHED_GRAMMARS = 64
NUM_THREADS = min(4, max(1, (os.cpu_count() or 1) // 4))
"""llguidance's threads, which fill rows at 10 µs to 1 ms each, without Python's lock. They spin for
a moment when they have nothing to do, so there are few: the model may run on the same cores."""


@dataclass(slots=True)
class _Matcher:
    """Follows the output of one choice.

    It has read `num_read` of the output's tokens, or will have once the task that was given them
    ends.
    """

    llguidance: LLMatcher
    num_read: int = 0


@dataclass(slots=True)
class _Constrained:
    """An unfinished request's grammar, and a matcher for each choice that has sampled."""

    compiled: Future[LLMatcher]
    num_unfinished: int
    matchers: dict[int, _Matcher] = field(default_factory=dict)
    seconds: float = 0.0
    """CPU time that its rows took; see slow_rows.py."""


class _Row(NamedTuple):
    """One row to fill: the tokens to read first, its drafts, for what it samples before and after
    each of those the end tokens to bar, and the tokens of which one is demanded, if it has no
    drafts. Both give way if the grammar allows nothing else. `row` is the row of the step's
    plan."""

    row: int
    matcher: LLMatcher
    token_ids: list[int]
    drafts: list[int]
    barred: list[frozenset[int]]
    constrained: _Constrained
    demanded: tuple[int, ...] = ()


class TokenMasks:
    """The bitmask of a step, being filled."""

    def __init__(self, rows: dict[int, int], bitmask: NDArray[np.int32]) -> None:
        self.rows = rows
        """Row of the step's plan → its first row of the bitmask; one for each draft follows."""
        self.errors: dict[int, RowError] = {}
        """By row of the step's plan; complete after `wait`."""
        self.filling: Future[None] | None = None
        self.bitmask = bitmask

    @property
    def mask_rows(self) -> list[int]:
        """For each row of the bitmask, the row of the step's plan."""
        ends = [*list(self.rows.values())[1:], len(self.bitmask)]
        spans = zip(self.rows.items(), ends, strict=True)
        return [row for (row, start), end in spans for _ in range(start, end)]

    def wait(self) -> NDArray[np.int32]:
        """Return the bitmask [C, W] once it is filled: bit i % 32 of word i // 32 allows token i.
        A row with an error allows every token."""
        if self.filling is not None:
            self.filling.result()
        return self.bitmask


class StructuredOutput:
    """Owns the grammars and matchers of an engine. One thread calls it.

    `vocab_size` is the width of the logits. `read_tokenizer` returns the text of the model's
    tokenizer.json; a thread calls it when the first constrained request arrives.
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: abc.Sequence[int], read_tokenizer: Callable[[], str]
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        self._read_tokenizer = read_tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._width = -(-vocab_size // 32)
        self._cache: OrderedDict[GrammarSpec, Future[LLMatcher]] = OrderedDict()
        self._requests: dict[str, _Constrained] = {}
        self._masks: TokenMasks | None = None
        self._executor: LLExecutor | None = None
        self._timed_steps = 0
        """How many more steps measure each row by itself."""
        # The compiler's thread loads the tokenizer, too. Rows are filled by a thread of their own,
        # so that no step waits for a grammar.
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler")
        self._filler = ThreadPoolExecutor(1, "grammar-rows")

    # -- requests ---------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise InvalidRequestError if the request has a grammar and this engine follows none."""
        if request.grammar is None:
            return
        if not is_available():
            raise InvalidRequestError("structured outputs need llguidance in the engine")
        if not self._eos_token_ids:
            raise InvalidRequestError(
                "structured outputs need a model with an end-of-sequence token"
            )

    def add(self, request: Request) -> None:
        """Begin to compile the request's grammar, if it has one."""
        if request.grammar is not None:
            self._requests[request.request_id] = _Constrained(
                self._compiled(request.grammar), len(request.open_choices)
            )

    def is_ready(self, request: Request) -> bool:
        """Return whether the request's grammar, if any, is compiled, or has failed to compile. Its
        rows report the failure."""
        constrained = self._requests.get(request.request_id)
        return constrained is None or constrained.compiled.done()

    def wait_compiled(self, timeout: float) -> None:
        """Wait until one of the grammars being compiled is ready, at most `timeout` seconds."""
        pending = [
            constrained.compiled
            for constrained in self._requests.values()
            if not constrained.compiled.done()
        ]
        if pending:
            wait(pending, timeout, return_when=FIRST_COMPLETED)

    def forget_finished(self, outputs: list[SequenceOutput]) -> None:
        """Drop the matchers and grammars of choices that have ended."""
        if not self._requests:
            return
        for output in outputs:
            constrained = self._requests.get(output.request_id)
            if constrained is not None and output.finish_reason is not None:
                constrained.matchers.pop(output.choice, None)
                constrained.num_unfinished -= 1
                if constrained.num_unfinished == 0:
                    del self._requests[output.request_id]
                    self._give_up(constrained.compiled)

    def _give_up(self, compiled: Future[LLMatcher]) -> None:
        """Take a grammar out of the compiler's queue if no unfinished request waits for it."""
        if compiled.done():
            return
        wanted = any(other.compiled is compiled for other in self._requests.values())
        if not wanted and compiled.cancel():
            for spec in [spec for spec, future in self._cache.items() if future is compiled]:
                del self._cache[spec]

    def _compiled(self, spec: GrammarSpec) -> Future[LLMatcher]:
        if spec not in self._cache:
            self._cache[spec] = self._compiler.submit(self._compile, spec)
        self._cache.move_to_end(spec)
        if len(self._cache) > MAX_CACHED_GRAMMARS:
            self._cache.popitem(last=False)
        return self._cache[spec]

    def _compile(self, spec: GrammarSpec) -> LLMatcher:
        if self._tokenizer is None:
            tokenizer = make_tokenizer(
                self._read_tokenizer(), self._vocab_size, self._eos_token_ids
            )
            self._width = -(-tokenizer.vocab_size // 32)
            self._tokenizer = tokenizer
        return compile_grammar(self._tokenizer, spec)

    # -- steps ------------------------------------------------------------------------------

    def start(
        self,
        rows: list[ReadingRow],
        demanded: abc.Mapping[int, tuple[int, ...]] = MappingProxyType({}),
    ) -> TokenMasks | None:
        """Begin to fill the bitmask of these rows of a step; None if there are none.

        Each row comes with its sequence, whose tokens are known, and has a grammar or is in
        `demanded`, which holds the tokens of which one must follow.
        """
        if self._masks is not None:  # if its step was given up, its tasks may still run
            self._masks.wait()
            self._masks = None
        if not rows:
            return None
        firsts, num_masks = {}, 0
        for one in rows:
            firsts[one.row] = num_masks
            num_masks += 1 + len(one.drafts)
        masks = TokenMasks(firsts, np.full((num_masks, self._width), -1, np.int32))
        to_fill: list[_Row] = []
        for one in rows:
            if one.sequence.request.grammar is None:
                _allow_only(masks.bitmask[firsts[one.row]], demanded[one.row])
                continue
            try:
                to_fill.append(self._row(one)._replace(demanded=demanded.get(one.row, ())))
            except Exception as error:  # whatever reading the tokenizer or the grammar raised
                masks.errors[one.row] = _row_error(error)
        if to_fill:
            masks.filling = self._filler.submit(self._fill, masks, to_fill)
        self._masks = masks
        return masks

    def propose(self, sequence: Sequence, k: int) -> list[int]:
        """Return up to `k` tokens that the grammar leaves no choice about, as drafts. The masks of
        the last step are filled by now."""
        constrained = self._requests.get(sequence.request.request_id)
        matcher = constrained and constrained.matchers.get(sequence.choice)
        if not matcher:
            return []
        self._read(matcher, sequence)
        forced: list[int] = matcher.llguidance.compute_ff_tokens()
        return [token_id for token_id in forced[:k] if token_id < self._vocab_size]

    def _read(self, matcher: _Matcher, sequence: Sequence) -> None:
        """Let a matcher read the tokens that it has not read."""
        new = sequence.token_ids[sequence.num_prompt_tokens + matcher.num_read :]
        matcher.num_read += len(new)
        if new:
            # A failure shows in the matcher's state, which is looked at when its row is filled.
            matcher.llguidance.consume_tokens(new)

    def _row(self, one: ReadingRow) -> _Row:
        row, sequence, drafts = one
        constrained = self._requests[sequence.request.request_id]
        matcher = constrained.matchers.get(sequence.choice)
        if matcher is None:
            matcher = _Matcher(constrained.compiled.result().deep_copy())
            constrained.matchers[sequence.choice] = matcher
        new = sequence.token_ids[sequence.num_prompt_tokens + matcher.num_read :]
        matcher.num_read += len(new)
        params = sequence.request.sampling_params
        barred: frozenset[int] = frozenset()
        if params.ignore_eos:
            barred = frozenset(self._eos_token_ids) - frozenset(params.stop_token_ids)
        output = range(sequence.num_output_tokens, sequence.num_output_tokens + len(drafts) + 1)
        return _Row(
            row,
            matcher.llguidance,
            new,
            drafts,
            [sequence.stop_ids if count < params.min_tokens else barred for count in output],
            constrained,
        )

    def _fill(self, masks: TokenMasks, rows: list[_Row]) -> None:
        try:
            self._fill_rows(masks, rows)
        except Exception as error:  # no row in particular is at fault
            masks.errors.update((row.row, _row_error(error)) for row in rows)
        for row in rows:
            if row.row in masks.errors:
                first = masks.rows[row.row]
                masks.bitmask[first : first + 1 + len(row.drafts)] = -1

    def _fill_rows(self, masks: TokenMasks, rows: list[_Row]) -> None:
        bitmask = masks.bitmask
        begin = time.monotonic()
        if self._timed_steps:
            self._timed_steps -= 1
            self._compute_timed(masks, rows)
        else:
            self._compute(masks, rows)
        if time.monotonic() - begin > slow_rows.SLOW_SECONDS:
            self._timed_steps = slow_rows.TIMED_STEPS
        _clear_from(bitmask, self._vocab_size)
        for row in rows:
            if row.demanded:
                # In the middle of a character the grammar wants its next byte first.
                _allow_only(bitmask[masks.rows[row.row]], row.demanded)
            for index, barred in enumerate(row.barred, masks.rows[row.row]):
                if barred:
                    self._bar(bitmask[index], barred)
        is_open: NDArray[np.bool_] = (bitmask != 0).any(axis=1)
        for row in rows:
            reason = matcher_failure(row.matcher)
            if reason is None and not is_open[masks.rows[row.row]]:
                reason = "no token continues it"
            if reason is not None:
                message = f"the grammar cannot be followed further: {reason}"
                masks.errors[row.row] = RowError(GrammarError.code, message)

    def _compute(self, masks: TokenMasks, rows: list[_Row]) -> None:
        """Let the matchers read their tokens and compute their masks, on all threads."""
        from llguidance import LLExecutor

        if self._executor is None:
            self._executor = LLExecutor(NUM_THREADS)
        for row in rows:
            if row.token_ids:
                # A failure shows in the matcher's state, which is looked at later.
                row.matcher.consume_tokens(row.token_ids)
        self._compute_masks(masks, rows)

    def _compute_masks(self, masks: TokenMasks, rows: list[_Row]) -> None:
        assert self._executor is not None
        bitmask = masks.bitmask
        memory = (bitmask.ctypes.data, bitmask.strides[0], len(bitmask))
        plain = [(row.matcher, masks.rows[row.row]) for row in rows if not row.drafts]
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *memory)
        drafted = [(row.matcher, masks.rows[row.row], row.drafts) for row in rows if row.drafts]
        if drafted:  # masks after a draft that the grammar does not allow are left as they are
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *memory)

    def _compute_timed(self, masks: TokenMasks, rows: list[_Row]) -> None:
        """Do as `_compute`, row by row on this thread, and fail the rows that take too long: the
        work of a very ambiguous grammar grows with each token, and every row waits for it."""
        spent: list[tuple[_Row, float]] = []
        for row in rows:
            # The masks of drafts are computed on other threads, whose CPU time is not known here.
            clock = time.monotonic if row.drafts else time.thread_time
            begin = clock()
            if row.token_ids:
                row.matcher.consume_tokens(row.token_ids)
            if row.drafts:
                self._compute_masks(masks, [row])
            else:
                bits = masks.bitmask[masks.rows[row.row]]
                row.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            seconds = clock() - begin
            spent.append((row, seconds))
        for row in slow_rows.at_fault(spent):
            masks.errors[row.row] = RowError(GrammarError.code, slow_rows.MESSAGE)

    def _bar(self, bits: NDArray[np.int32], token_ids: frozenset[int]) -> None:
        """Forbid these tokens in a row, unless the row allows nothing else."""
        others = bits.copy()
        for token_id in token_ids:
            if token_id < self._vocab_size:
                others[token_id >> 5] &= ~np.left_shift(np.int32(1), token_id & 31)
        if others.any():
            bits[:] = others


def _allow_only(bits: NDArray[np.int32], token_ids: tuple[int, ...]) -> None:
    """Forbid all but these tokens in a row, as far as the row allows any of them."""
    only = np.zeros_like(bits)
    for token_id in token_ids:
        only[token_id >> 5] |= np.left_shift(np.int32(1), token_id & 31)
    only &= bits
    if only.any():
        bits[:] = only


def _clear_from(bitmask: NDArray[np.int32], end: int) -> None:
    """Forbid ids ≥ `end`: a tokenizer may have more tokens than the model's logits."""
    word, bit = divmod(end, 32)
    if word < bitmask.shape[1]:
        bitmask[:, word] &= np.int32((1 << bit) - 1)
        bitmask[:, word + 1 :] = 0


def _row_error(error: Exception) -> RowError:
    return RowError(GrammarError.code, f"the grammar cannot be followed: {error}"[:500])
