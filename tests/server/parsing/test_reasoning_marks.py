"""The tokens of a vocabulary that may be a part of a mark."""

from __future__ import annotations

import pytest

from quire.engine.reasoning import ReasoningTracker
from quire.server.parsing.formats.reasoning_marks import ReasoningMarks, _pieces
from quire.server.parsing.reasoning import CLOSE, OPEN
from quire.server.text.tokenizer import Tokenizer

from ...engine.grammar.constrained import DEMO
from ..fakes import byte_tokenizer

TEXTS = (OPEN, CLOSE, "◁think▷")


@pytest.mark.parametrize("name", ["demo", "bytes"])
def test_every_token_that_can_touch_a_mark_is_found(name: str) -> None:
    tokenizer = Tokenizer.load(str(DEMO)) if name == "demo" else byte_tokenizer(special=TEXTS)
    pieces = _pieces(tokenizer, TEXTS)
    for token_id in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token_id)
        touches = not data.strip(b" \t\r\n")
        for mark in map(str.encode, TEXTS):
            touches |= data in mark or mark in data
            touches |= any(data.endswith(mark[:end]) for end in range(1, len(mark)))
            touches |= any(data.startswith(mark[start:]) for start in range(1, len(mark)))
        assert pieces.get(token_id, data) == data
        assert token_id in pieces or not touches, data
    assert len(pieces) < tokenizer.vocab_size / 2


def test_reasoning_is_counted_however_its_tags_are_cut() -> None:
    tokenizer = Tokenizer.load(str(DEMO))
    spec = ReasoningMarks("qwen3", tokenizer).spec("", None)
    assert spec is not None
    encode = tokenizer.backend.encode
    for thought in ("Hm.", "a <b> </thin", ">>", "\n\nlong " * 9):
        for before, after in ((OPEN, CLOSE), (OPEN + "\n", CLOSE + "\n\nSo"), ("\n" + OPEN, CLOSE)):
            tokens = encode(before + thought + after + " it is.").ids
            ends = [len(tokenizer.backend.decode(tokens[: n + 1])) for n in range(len(tokens))]
            starts = [0, *ends]
            text = tokenizer.backend.decode(tokens)
            first, last = text.index(OPEN) + len(OPEN), text.index(CLOSE)
            tracker = ReasoningTracker(spec)
            tracker.read(tokens)
            expected = sum(first <= start < last for start in starts[:-1])
            assert tracker.num_reasoning_tokens == expected
