"""Stop strings that contain control tokens, which the text does not show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.text.detokenizer import Detokenizer
from quire.server.text.stop_strings import StopStrings

from ..fakes import IM_END, IM_START, byte_tokenizer, ids

TOKENIZER = byte_tokenizer()
START, END = "<|im_start|>", "<|im_end|>"


def tokens_of(text: str) -> list[int]:
    """Return the token ids of a text in which control tokens are tokens."""
    token_ids: list[int] = TOKENIZER.backend.encode(text).ids
    return token_ids


def run(
    token_ids: list[int], stops: list[str], *, ended_by: int | None = None, include: bool = False
) -> tuple[str, str | None, int]:
    """Return the text, the stop string that was found, and how many tokens were read."""
    skip, hidden = TOKENIZER.skipped_but((), stops)
    detokenizer = Detokenizer(
        TOKENIZER.backend,
        skip_special_tokens=skip,
        hidden=hidden,
        stops=stops,
        include_stop=include,
    )
    text, count = "", 0
    for token_id in token_ids:
        piece, read = detokenizer.feed([token_id])
        text, count = text + piece, count + read
        if detokenizer.stop is not None:
            return text, detokenizer.stop, count
    if ended_by is not None:
        text += detokenizer.end(ended_by)
    return text + detokenizer.finish(), detokenizer.stop, count


@pytest.mark.parametrize(
    ("answer", "stops", "text", "found"),
    [
        # The stop string is a control token.
        (f"one{END}two", [END], "one", END),
        # It contains one: at its end, at its beginning, in the middle, two in a row.
        (f"one STOP{END}two", [f"STOP{END}"], "one ", f"STOP{END}"),
        (f"one{START}user\nx", [f"{START}user"], "one", f"{START}user"),
        (f"ab{END}cd", [f"b{END}c"], "a", f"b{END}c"),
        (f"ab{END}{START}cd", [f"{END}{START}"], "ab", f"{END}{START}"),
        # It begins, and does not complete.
        (f"one STOP{START}two", [f"STOP{END}"], "one STOPtwo", None),
        (f"one STOP two{END}", [f"STOP{END}"], "one STOP two", None),
        # A hidden token that is in no stop string stands between.
        (f"a{START}{END}b", [f"a{END}"], "ab", None),
        # A stop string without control tokens is looked for in the text that is shown.
        (f"o{START}ne", ["one", END], "", "one"),
        (f"o{START}ne", ["im_", END], "one", None),
        # The first that is complete wins.
        (f"one{END}two", ["two", END], "one", END),
        (f"one{END}two", ["one", END], "", "one"),
        # The same characters as ordinary text are a stop string too.
        ("one<|im_end|>two", ["<|im_end|>"], "one", END),
    ],
)
def test_stop_strings_with_control_tokens(
    answer: str, stops: list[str], text: str, found: str | None
) -> None:
    assert run(tokens_of(answer), stops)[:2] == (text, found)


def test_the_same_characters_as_ordinary_text_stop_too() -> None:
    assert run(ids("one<|im_end|>two"), [END])[:2] == ("one", END)


def test_a_stop_string_is_included_if_that_is_asked_for() -> None:
    assert run(tokens_of(f"one{END}two"), [f"e{END}"], include=True)[0] == f"one{END}"


def test_tokens_are_counted_up_to_the_control_token() -> None:
    assert run(tokens_of(f"one{END}two"), [END])[2] == 4


@pytest.mark.parametrize(
    ("stops", "text", "found"),
    [([f"e{END}"], "on", f"e{END}"), ([END], "one", END), ([f"x{END}"], "one", None)],
)
def test_the_token_that_ends_an_answer_completes_a_stop_string(
    stops: list[str], text: str, found: str | None
) -> None:
    assert run(ids("one"), stops, ended_by=IM_END)[:2] == (text, found)
    assert run(ids("one"), ["e"], ended_by=IM_END)[:2] == ("on", "e")


def test_text_before_min_tokens_is_not_looked_at() -> None:
    skip, hidden = TOKENIZER.skipped_but((), [END])
    detokenizer = Detokenizer(
        TOKENIZER.backend, skip_special_tokens=skip, hidden=hidden, stops=[END], min_tokens=2
    )
    assert detokenizer.feed([IM_END, *ids("ab"), IM_END, *ids("c")]) == ("ab", 4)


pieces = st.lists(st.sampled_from([START, END, "a", "b"]), max_size=12)
stops = st.lists(
    st.lists(st.sampled_from([END, "a", "b"]), min_size=1, max_size=3).map("".join),
    min_size=1,
    max_size=3,
)


@given(pieces, stops)
def test_what_is_found_is_what_a_search_of_the_whole_answer_finds(
    answer: list[str], stops: list[str]
) -> None:
    """The oracle: the shortest beginning of the answer that ends with a stop string, where one
    without control tokens is looked for in the text without them."""
    text, found, count = run(tokens_of("".join(answer)), stops)
    shown = [piece for piece in answer if piece not in (START, END)]
    for length in range(1, len(answer) + 1):
        begun = "".join(answer[:length])
        visible = begun.replace(START, "").replace(END, "")
        ends = [
            stop
            for stop in stops
            if (begun.endswith(stop) if END in stop else visible.endswith(stop))
            and not (END not in stop and answer[length - 1] in (START, END))
        ]
        if ends:
            assert found in ends
            assert count == length
            assert found is not None
            assert text == visible[: len(visible) - len(found.replace(END, ""))]
            return
    assert (text, found) == ("".join(shown), None)


@given(pieces, stops)
def test_no_more_is_held_back_than_a_stop_string_needs(answer: list[str], stops: list[str]) -> None:
    search = StopStrings(stops, {IM_START: START, IM_END: END}, include_stop=False)
    shown = emitted = ""
    for piece in answer:
        if piece in (START, END):
            emitted += search.feed_hidden(IM_START if piece == START else IM_END)
        else:
            shown += piece
            emitted += search.feed(piece)
        if search.found is not None:
            return
        assert shown.startswith(emitted)
        assert len(shown) - len(emitted) < max(map(len, stops))
    assert emitted + search.finish() == shown
