from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models

from quire.server.text.detokenizer import MAX_PENDING, Detokenizer

from ..fakes import IM_END, VOCAB_SIZE, byte_tokenizer, ids

BYTES = byte_tokenizer().backend
FALLBACK = Encoder(
    models.BPE(
        vocab={"<unk>": 0, "▁Hi": 1, "▁you": 2, "!": 3}
        | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
    )
)
FALLBACK.decoder = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=MAX_PENDING)
# Short texts over few letters, so that stop strings begin, overlap and complete often.
letters = st.text("ab", max_size=20)
stops = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


def run(detokenizer: Detokenizer, pieces: list[list[int]]) -> str:
    text = ""
    for piece in pieces:
        text += detokenizer.feed(piece)[0]
        if detokenizer.stop is not None:
            return text
    return text + detokenizer.finish()


@given(tokens, st.booleans())
def test_incremental_decoding_equals_decoding_at_once(token_ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(BYTES, skip_special_tokens=skip)
    text = run(detokenizer, [[token_id] for token_id in token_ids])
    assert text == BYTES.decode(token_ids, skip_special_tokens=skip)


@given(st.text(max_size=20), st.integers(1, 5))
def test_no_character_is_split(text: str, size: int) -> None:
    token_ids = ids(text)
    detokenizer = Detokenizer(BYTES)
    pieces = [token_ids[at : at + size] for at in range(0, len(token_ids), size)]
    emitted = [detokenizer.feed(piece)[0] for piece in pieces]
    assert "".join(emitted) + detokenizer.finish() == text
    assert "\ufffd" in text or all("\ufffd" not in part for part in emitted)


@given(st.lists(st.integers(0, 259), max_size=60))
def test_byte_fallback_tokens_never_break_decoding(token_ids: list[int]) -> None:
    one_by_one = run(Detokenizer(FALLBACK), [[token_id] for token_id in token_ids])
    assert one_by_one == run(Detokenizer(FALLBACK), [token_ids])


def test_text_continues_after_an_incomplete_byte_fallback() -> None:
    euro = [4 + byte for byte in "€".encode()]
    token_ids = [*euro, *euro[:2], 3, 2]
    assert run(Detokenizer(FALLBACK, context=[1]), [[token] for token in token_ids]).endswith(
        "! you"
    )


def test_the_first_word_keeps_its_space_after_a_prompt() -> None:
    assert run(Detokenizer(FALLBACK, context=[1]), [[2], [3]]) == " you!"


@given(letters, stops, st.integers(1, 4), st.booleans())
def test_stop_strings_cut_the_same_however_tokens_are_grouped(
    text: str, stops: list[str], size: int, include: bool
) -> None:
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    token_ids = ids(text)
    pieces = [token_ids[at : at + size] for at in range(0, len(token_ids), size)]
    detokenizer = Detokenizer(BYTES, stops=stops, include_stop=include)
    found = run(detokenizer, pieces)
    if not ends:
        assert (found, detokenizer.stop) == (text, None)
        return
    end = min(ends)[0]
    assert detokenizer.stop is not None
    assert text[:end].endswith(detokenizer.stop)
    assert found == (text[:end] if include else text[: end - len(detokenizer.stop)])


@given(letters, stops)
def test_no_more_text_is_held_back_than_a_stop_string_needs(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(BYTES, stops=stops)
    emitted = ""
    for count, token_id in enumerate(ids(text), 1):
        emitted += detokenizer.feed([token_id])[0]
        if detokenizer.stop is not None:
            return
        assert text.startswith(emitted)
        assert count - len(emitted) < max(map(len, stops))


def test_tokens_after_a_stop_string_are_not_counted() -> None:
    detokenizer = Detokenizer(BYTES, stops=["b"])
    assert detokenizer.feed(ids("aabcc")) == ("aa", 3)
    assert detokenizer.stop == "b"


def test_stop_strings_are_ignored_before_min_tokens() -> None:
    detokenizer = Detokenizer(BYTES, stops=["b"], min_tokens=3)
    assert detokenizer.feed(ids("abacab")) == ("abaca", 6)


@pytest.mark.parametrize("token_id", [ids("é")[0], IM_END])
def test_pending_tokens_without_text_are_bounded(token_id: int) -> None:
    detokenizer = Detokenizer(BYTES)
    emitted = ""
    for _ in range(1000):
        emitted += detokenizer.feed([token_id])[0]
        assert len(detokenizer._pending) <= MAX_PENDING
    assert emitted + detokenizer.finish() == ("" if token_id == IM_END else "\ufffd" * 1000)
