"""Large answers in one piece, which are made beside the event loop."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from quire.engine.outputs import RowError
from quire.server.api import whole_answers
from quire.server.api.logprobs import LogprobFormat
from quire.server.api.whole_answers import encode_in_pieces, is_large
from quire.server.json_text import encode_json

from ..conftest import MODEL
from ..fakes import FakeEngineClient, Script, ids
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


def test_large_values_are_told_from_small_ones_without_walking_through_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(whole_answers, "LARGE", 100)
    assert not is_large({"a": [1] * 90, "b": "x" * 8000})
    assert is_large({"a": [{"b": [1, 2, 3]}] * 30})
    assert is_large(["x" * 200_000])
    assert is_large([[[0]] * 60, [[0]] * 60])

    class Endless(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("walked through a list whose length tells enough")

    assert is_large({"a": Endless([1] * 101)})


RESPONSES = "/v1/responses"
ASKED: dict[str, Any] = {
    "model": MODEL, "input": "hi", "top_logprobs": 5, "include": ["message.output_text.logprobs"]
}  # fmt: skip


def plain(value: Any) -> Any:
    """Return an answer without what differs each time."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        volatile = ("id", "item_id", "created_at", "completed_at", "previous_response_id")
        return {name: plain(member) for name, member in value.items() if name not in volatile}
    return value


async def all_answers(client: httpx.AsyncClient) -> list[Any]:
    """Return what a response is in all its forms: whole, in events, stored, as items."""
    conversation = (await client.post("/v1/conversations", json={})).json()["id"]
    whole = (await client.post(RESPONSES, json={**ASKED, "conversation": conversation})).json()
    streamed = await client.post(RESPONSES, json={**ASKED, "stream": True})
    events = [
        json.loads(line.removeprefix("data: "))
        for line in streamed.text.splitlines()
        if line.startswith("data: ")
    ]
    names = [line[7:] for line in streamed.text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    stored = (await client.get(f"{RESPONSES}/{whole['id']}")).json()
    items = (await client.get(f"/v1/conversations/{conversation}/items")).json()
    item = items["data"][0]["id"]
    one = (await client.get(f"/v1/conversations/{conversation}/items/{item}")).json()
    follow_up = {**ASKED, "previous_response_id": whole["id"]}
    follow = (await client.post(RESPONSES, json=follow_up)).json()
    listed = (await client.get(f"{RESPONSES}/{follow['id']}/input_items")).json()
    message = (await client.post("/v1/messages", json={**HI, "max_tokens": 9})).json()
    tokens = (await client.post("/tokenize", json={"prompt": "abc"})).json()
    del items["first_id"], items["last_id"], listed["first_id"], listed["last_id"]
    return [plain(each) for each in (whole, events, stored, items, one, listed, message, tokens)]


async def test_large_responses_are_encoded_and_counted_beside_the_event_loop(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = await all_answers(client)
    sizes = [entry.num_bytes for entry in client.app.state.quire.responses._ended.values()]  # type: ignore[attr-defined]
    threads: list[int] = []
    original = whole_answers.encode_in_pieces

    def encode(value: Any, depth: int) -> Any:
        if depth == whole_answers._DEPTH:
            threads.append(threading.get_ident())
        return original(value, depth)

    monkeypatch.setattr(whole_answers, "encode_in_pieces", encode)
    monkeypatch.setattr(whole_answers, "LARGE", 3)
    large = await all_answers(client)
    assert large == small
    assert len(threads) > 15 and threading.get_ident() not in threads
    ended = list(client.app.state.quire.responses._ended.values())  # type: ignore[attr-defined]
    assert [entry.num_bytes for entry in ended[len(sizes) :]] == sizes
    for entry in ended:
        true = len(encode_json(entry.response)) + len(encode_json(entry.items))
        assert abs(entry.num_bytes - true) <= 4  # commas and brackets of a list that grew


async def test_a_large_response_that_fails_is_ended_beside_the_event_loop(
    client: httpx.AsyncClient, engine: FakeEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RowError("step_failed", "a step failed")
    engine.scripts = lambda request, choice: Script(ids("abcdef"), "error", error)
    monkeypatch.setattr(whole_answers, "LARGE", 3)
    answer = await client.post(RESPONSES, json={**ASKED, "stream": True})
    last = json.loads(answer.text.strip().rpartition("data: ")[2])
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    stored = await client.get(f"{RESPONSES}/{last['response']['id']}")
    assert stored.json() == last["response"]
