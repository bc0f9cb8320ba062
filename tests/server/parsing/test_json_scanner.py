from __future__ import annotations

import json
import random
from typing import Any

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


@given(st.text('{}[]":,0129.eE+-trufalsn \\"/\t\x01', max_size=20), st.randoms())
def test_the_scanner_agrees_with_the_standard_library(text: str, rng: random.Random) -> None:
    text = "[" + text
    whole = scan([text])
    assert scan(list(text)) == scan(cut(text, rng)) == whole
    decoder = json.JSONDecoder(strict=False, parse_constant=lambda name: json.loads("?"))
    try:
        value, end = decoder.raw_decode(text)
    except json.JSONDecodeError:
        assert not whole[0]
    else:
        assert whole[0]
        assert json.loads(whole[1]) == value
        assert len(whole[1]) >= end


@given(JSON.filter(lambda value: isinstance(value, (str, list, dict))), st.randoms())
def test_the_scanner_passes_every_value(value: Any, rng: random.Random) -> None:
    text = json.dumps(value)
    assert scan([*cut(text, rng), " more"]) == (True, text)
