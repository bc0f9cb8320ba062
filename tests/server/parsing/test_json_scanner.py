from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.parsing.json_scanner import JsonScanner

from .pieces import JSON, cut


def scan(pieces: list[str]) -> tuple[bool, str]:
    """Return whether the value ended, and the text that was accepted."""
    scanner, accepted = JsonScanner(), ""
    for piece in pieces:
        at = 0
        at, text = scanner.feed(piece, at)
        accepted += text
        if at < len(piece):
            break
    return scanner.done, accepted


@given(st.text('{}[]":,0129.eE+-trufalsn \\"/\t\x01TFNo\'ud', max_size=20), st.randoms())
def test_the_scanner_agrees_with_the_standard_library(text: str, rng: random.Random) -> None:
    text = "[" + text
    whole = scan([text])
    assert scan(list(text)) == scan(cut(text, rng)) == whole
    decoder = json.JSONDecoder(strict=False, parse_constant=lambda name: json.loads("?"))
    try:
        value, end = decoder.raw_decode(text)
    except json.JSONDecodeError:
        if whole[0]:  # it is not JSON, but what comes out is
            json.loads(whole[1])
    else:
        assert whole[0]
        assert json.loads(whole[1]) == value
        assert len(whole[1]) >= end


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'a': 'b\"c', \"d\": 'e'}", {"a": 'b"c', "d": "e"}),
        ("[True, False, None, true, false, null]", [True, False, None, True, False, None]),
        ("[1, 2, \n]", [1, 2]),
        ('{"a": [], }', {"a": []}),
        (r'["\d\.\'\x41", "\u12g", "\u"]', ["\\d\\.'\\x41", "\\u12g", "\\u"]),
        (r"['\xe9\U0001F389\'\"']", ["é🎉'\""]),
        (r"['\U00110000', '\x4g']", ["\\U00110000", "\\x4g"]),
        ('["a\x00\n\\\tb"]', ["a\x00\n\\\tb"]),
    ],
)
def test_what_models_write_for_json_is_json(text: str, value: Any) -> None:
    done, accepted = scan([text])
    assert done and json.loads(accepted) == value
    assert scan(list(text)) == (done, accepted)


@pytest.mark.parametrize(
    "text", ["[,]", "[1,,]", "{,}", "[Nope]", "[nULL]", "[NaN]", "{a: 1}", "['a\"]"]
)
def test_what_is_not_json_either_is_refused(text: str) -> None:
    assert not scan([text])[0]


@given(JSON.filter(lambda value: isinstance(value, (str, list, dict))), st.randoms())
def test_the_scanner_passes_every_value(value: Any, rng: random.Random) -> None:
    text = json.dumps(value)
    assert scan([*cut(text, rng), " more"]) == (True, text)
