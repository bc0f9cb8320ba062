"""Test the masks that matchers make for a step, without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.engine.grammar import masks as structured_output
from quire.engine.grammar.constraints import NOTHING_PENDING, start_constraints
from quire.engine.grammar.masks import StructuredOutput
from quire.engine.request import GrammarSpec, Request
from quire.engine.sequence import Rank, ReadingRow, Sequence, SequenceStatus

from .constrained import END_OF_TEXT, EOS, GRAMMARS, TOKENIZER, VOCAB_SIZE, make_request


def step_of(*sequences: Sequence) -> list[ReadingRow]:
    return [ReadingRow(row, sequence, []) for row, sequence in enumerate(sequences)]


def allowed(bits: Any) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())


def make_structured(request: Request, vocab_size: int = VOCAB_SIZE) -> StructuredOutput:
    structured = StructuredOutput(vocab_size, (EOS, END_OF_TEXT), TOKENIZER.to_str)
    structured.add(request)
    while not structured.is_ready(request):
        structured.wait_compiled(1.0)
    return structured


def sequences_of(request: Request) -> list[Sequence]:
    return [
        Sequence(request, choice, 0, Rank(0, 0, choice), frozenset({EOS}))
        for choice in range(request.sampling_params.n)
    ]


def token(text: str) -> int:
    return TOKENIZER.get_vocab()[text]


def test_forks_have_their_own_matchers_and_a_new_one_catches_up() -> None:
    request = make_request("r", GrammarSpec("regex", "a1|b2"), n=2)
    structured = make_structured(request)
    first, second = sequences_of(request)
    masks = structured.start(step_of(first, second))
    assert masks is not None and masks.rows == {0: 0, 1: 1}
    for row in masks.wait():
        assert allowed(row) == {token("a"), token("b")}
    first.token_ids.append(token("a"))
    second.token_ids.append(token("b"))
    masks = structured.start(step_of(second, first))
    assert masks is not None
    assert [allowed(row) for row in masks.wait()] == [{token("2")}, {token("1")}]
    # The same step again, as after one that ran out of memory, with new matchers.
    structured._requests["r"].matchers.clear()
    masks = structured.start(step_of(second, first))
    assert masks is not None
    assert [allowed(row) for row in masks.wait()] == [{token("2")}, {token("1")}]
    first.token_ids.append(token("1"))
    masks = structured.start(step_of(first))
    assert masks is not None and allowed(masks.wait()[0]) == {EOS, END_OF_TEXT}


def test_only_unfinished_constrained_rows_have_a_mask() -> None:
    request = make_request("r", GRAMMARS["regex"][0])
    structured = make_structured(request)
    [constrained] = sequences_of(request)
    [plain] = sequences_of(make_request("p", None, bad_words=((4, 5),)))
    pending = start_constraints(structured, step_of(plain, constrained))
    constraints = pending.wait()
    assert constraints.mask_rows == [1] and not pending.errors
    assert len(constraints.bitmask) == VOCAB_SIZE // 8
    constrained.status = SequenceStatus.FINISHED  # by results during the forward
    assert start_constraints(structured, step_of(plain, constrained)) is NOTHING_PENDING


def test_ids_beyond_the_logits_are_never_allowed() -> None:
    """A tokenizer may know more tokens than its model has logits."""
    request = make_request("r", GrammarSpec("regex", "(.|\n)*"))
    structured = make_structured(request, vocab_size=1001)
    masks = structured.start(step_of(*sequences_of(request)))
    assert masks is not None
    ids = allowed(masks.wait()[0])
    assert len(ids) > 900 and max(ids) <= 1000


def test_the_cache_of_grammars_is_bounded_and_waiting_requests_keep_theirs() -> None:
    first = make_request("first", GrammarSpec("regex", "a"))
    structured = make_structured(first)
    for number in range(structured_output.MAX_CACHED_GRAMMARS + 5):
        structured.add(make_request(str(number), GrammarSpec("regex", f"a{number}")))
    assert len(structured._cache) == structured_output.MAX_CACHED_GRAMMARS
    assert structured.is_ready(first)
    masks = structured.start(step_of(*sequences_of(first)))
    assert masks is not None and allowed(masks.wait()[0]) == {token("a")}
