"""Large answers in one piece, which are made beside the event loop."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from quire.server.api import whole_answers
from quire.server.api.logprobs import LogprobFormat
from quire.server.api.whole_answers import encode_in_pieces
from quire.server.json_text import encode_json

from ..openai_http import CHAT, COMPLETIONS, HI, PROMPT

VALUES = [
    None,
    {},
    [],
    {"a": []},
    [{}, [1, 2.5, "\u00e9\u2028"], None],
    {"choices": [{"index": 0, "logprobs": {"content": [{"token": "a", "top": [[1], 1e-5]}]}}] * 2},
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("depth", range(7))
def test_pieces_are_the_same_json(value: Any, depth: int) -> None:
    assert b"".join(encode_in_pieces(value, depth)) == encode_json(value)


@pytest.mark.parametrize(
    "path, body",
    [
        (CHAT, {**HI, "logprobs": True, "top_logprobs": 5, "n": 3, "prompt_logprobs": 2}),
        (COMPLETIONS, {**PROMPT, "logprobs": 5, "n": 3, "prompt_logprobs": 2}),
    ],
)
async def test_a_large_answer_is_made_beside_the_event_loop(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    threads: set[int] = set()
    original = LogprobFormat._pairs

    def pairs(self: LogprobFormat, *arguments: Any) -> dict[int, float]:
        threads.add(threading.get_ident())
        return original(self, *arguments)

    monkeypatch.setattr(LogprobFormat, "_pairs", pairs)
    small = await client.post(path, json=body)
    assert threads == {threading.get_ident()}
    threads.clear()
    monkeypatch.setattr(whole_answers, "LARGE", 10)
    monkeypatch.setattr(whole_answers, "HUGE", 20)
    large = await client.post(path, json=body)
    assert threads and threading.get_ident() not in threads
    assert large.headers["content-type"] == small.headers["content-type"] == "application/json"
    for name in ("choices", "usage"):
        assert large.json()[name] == small.json()[name]
    assert large.json().keys() == small.json().keys()
