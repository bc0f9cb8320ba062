"""Limits of keys as clients see them: 429 with its headers, by key and for both APIs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.engine.lora import AdapterSource

from ..conftest import MODEL, MakeClient
from ..fakes import FakeEngineClient, Script, ids
from ..openai_http import CHAT, COMPLETIONS, HI, PROMPT, assert_error

MESSAGES = "/v1/messages"
MESSAGE = {**HI, "max_tokens": 4}
KEYS = """
alice: sk-alice
bob: {key: sk-bob, requests_per_minute: 2}
carol: {key: sk-carol, models: [story]}
root: {key: sk-root, admin: true}
"""


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(KEYS)
    return path


def by(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer sk-{name}"}


async def test_requests_a_minute_are_limited_by_key(make_client: MakeClient, keys: Path) -> None:
    client = make_client(api_keys_file=keys, limit_requests_per_minute=3)
    left = []
    for _ in range(3):
        response = await client.post(COMPLETIONS, json=PROMPT, headers=by("alice"))
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        assert "x-ratelimit-limit-tokens" not in response.headers
        left.append(response.headers["x-ratelimit-remaining-requests"])
    assert left == ["2", "1", "0"]
    response = await client.post(COMPLETIONS, json=PROMPT, headers=by("alice"))
    assert_error(response, 429, "rate_limit_exceeded", None)
    assert "alice" in response.text and "sk-" not in response.text
    assert 1 <= int(response.headers["retry-after"]) <= 120
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert response.headers["x-ratelimit-reset-requests"].endswith("s")
    # Reading costs nothing, another key has its own limit, and admins have none.
    assert (await client.get("/v1/models", headers=by("alice"))).status_code == 200
    for name, allowed in (("bob", 2), ("root", 6)):
        answers = [await client.post(CHAT, json=HI, headers=by(name)) for _ in range(allowed)]
        assert {answer.status_code for answer in answers} == {200}
    assert (await client.post(CHAT, json=HI, headers=by("bob"))).status_code == 429
    page = (await client.get("/metrics")).text
    assert 'quire:key_rejections_total{engine="0",key="alice",model_name="tiny"} 1.0' in page
    assert 'reason="rate_limit_exceeded"} 2.0' in page and "sk-" not in page


async def test_anthropics_clients_get_that_apis_errors_and_headers(
    make_client: MakeClient, keys: Path
) -> None:
    client = make_client(api_keys_file=keys, limit_tokens_per_minute=1000)
    headers = {"x-api-key": "sk-bob"}
    for _ in range(2):
        response = await client.post(MESSAGES, json=MESSAGE, headers=headers)
        assert response.status_code == 200, response.text
    assert response.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert 0 < int(response.headers["anthropic-ratelimit-tokens-remaining"]) < 1000
    assert response.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]
    response = await client.post(MESSAGES, json=MESSAGE, headers=headers)
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("streamed", [False, True])
async def test_prompts_and_answers_count_as_tokens(
    make_client: MakeClient, engine: FakeEngineClient, streamed: bool
) -> None:
    """The prompt counts by its tokens once they are known, and the answer as it comes."""
    client = make_client(api_key=("sk-alice", "sk-bob"), limit_tokens_per_minute=100)
    engine.scripts = lambda request, choice: Script(ids("abcdefghi"), chunk=3)
    fields = {"model": MODEL, "prompt": [1] * 20, "max_tokens": 50, "stream": streamed}
    left = []
    for _ in range(3):
        response = await client.post(COMPLETIONS, json=fields, headers=by("alice"))
        assert response.status_code == 200
        left.append(int(response.headers["x-ratelimit-remaining-tokens"]))
    # Each used 20 + 10. The headers of a stream leave before most of its answer has come.
    assert (left == [70, 40, 10]) if not streamed else (left[0] >= 70 and left[2] >= 10)
    response = await client.post(COMPLETIONS, json=fields, headers=by("alice"))
    assert_error(response, 429, "rate_limit_exceeded", None)
    assert response.headers["x-ratelimit-remaining-tokens"] == "10"
    assert len(engine.requests) == 3
    assert (await client.post(COMPLETIONS, json=fields, headers=by("bob"))).status_code == 200
    # A prompt that exceeds the limit by itself waits for an unused minute, and is served then.
    fields["prompt"] = [1] * 300
    response = await client.post(COMPLETIONS, json=fields, headers=by("bob"))
    assert response.status_code == 429
    fresh = make_client(api_key=("sk-alice",), limit_tokens_per_minute=100)
    assert (await fresh.post(COMPLETIONS, json=fields, headers=by("alice"))).status_code == 200


async def test_a_request_that_is_refused_later_costs_no_tokens(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    client = make_client(limit_tokens_per_minute=1000)  # without keys, one limit for all
    long = {"model": MODEL, "prompt": "p" * 600}  # beyond the context
    assert (await client.post(COMPLETIONS, json=long)).status_code == 400
    engine.ready = False
    response = await client.post(COMPLETIONS, json=PROMPT)
    assert response.status_code == 503
    assert response.headers["x-ratelimit-remaining-tokens"] == "1000"


async def test_requests_at_once_are_limited_until_they_end(
    make_client: MakeClient, engine: FakeEngineClient, keys: Path
) -> None:
    engine.hold = asyncio.Event()
    client = make_client(api_keys_file=keys, limit_concurrent_requests=2)
    bodies = [(COMPLETIONS, PROMPT), (CHAT, {**HI, "stream": True})]
    running = [
        asyncio.create_task(client.post(path, json=body, headers=by("alice")))
        for path, body in bodies
    ]
    async with asyncio.timeout(5):
        while len(engine.requests) < 2:
            await asyncio.sleep(0.001)
    response = await client.post(MESSAGES, json=MESSAGE, headers={"x-api-key": "sk-alice"})
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    other = asyncio.create_task(client.post(CHAT, json=HI, headers=by("bob")))
    running[0].cancel()  # a client that leaves frees its place, too
    await asyncio.gather(running[0], return_exceptions=True)
    third = asyncio.create_task(client.post(CHAT, json=HI, headers=by("alice")))
    async with asyncio.timeout(5):
        while len(engine.requests) < 4:
            await asyncio.sleep(0.001)
    engine.hold.set()
    answers = await asyncio.gather(running[1], other, third)
    assert {answer.status_code for answer in answers} == {200}
    for _ in range(3):
        assert (await client.post(CHAT, json=HI, headers=by("alice"))).status_code == 200


async def test_one_key_cannot_fill_the_queue_of_all(
    make_client: MakeClient, engine: FakeEngineClient, tmp_path: Path
) -> None:
    engine.hold = asyncio.Event()
    keys = tmp_path / "keys.yaml"
    keys.write_text("alice: sk-alice\nbob: sk-bob\ncarol: sk-carol\n")
    limits = {"max_num_seqs": 1, "max_num_queued_reqs": 6, "max_num_queued_tokens": 100}
    client = make_client(api_keys_file=keys, **limits)

    async def send(name: str, **fields: object) -> httpx.Response:
        return await client.post(COMPLETIONS, json={**PROMPT, **fields}, headers=by(name))

    async def sent(count: int) -> None:
        async with asyncio.timeout(5):
            while len(engine.requests) < count:
                await asyncio.sleep(0.001)

    # The one that an engine may run, and six that wait: seven places.
    answers = [asyncio.create_task(send("alice")) for _ in range(7)]
    await sent(7)
    assert_error(await send("alice"), 429, "queue_full", None)
    # Another key has half of them, and one prompt of any length; two others have a third each.
    answers.append(asyncio.create_task(send("bob", prompt=[1] * 200)))
    await sent(8)
    assert_error(await send("bob", prompt=[1] * 200), 429, "queue_full", None)
    assert_error(await send("bob", n=3), 429, "queue_full", None)
    answers.append(asyncio.create_task(send("carol", n=2)))
    await sent(9)
    assert_error(await send("carol"), 429, "queue_full", None)
    engine.hold.set()
    assert {answer.status_code for answer in await asyncio.gather(*answers)} == {200}
    assert (await send("alice")).status_code == 200


async def test_a_key_may_be_restricted_to_models(
    make_client: MakeClient, engine: FakeEngineClient, keys: Path
) -> None:
    engine.adapters["story"] = AdapterSource("story", "/nowhere")
    client = make_client(api_keys_file=keys)
    listed = (await client.get("/v1/models", headers=by("carol"))).json()["data"]
    assert [card["id"] for card in listed] == ["story"]
    assert (await client.get(f"/v1/models/{MODEL}", headers=by("carol"))).status_code == 404
    for body in (HI, {"messages": HI["messages"]}):  # by its name, and by default
        response = await client.post(CHAT, json=body, headers=by("carol"))
        assert_error(response, 404, "model_not_found", "model")
    response = await client.post(CHAT, json={**HI, "model": "story"}, headers=by("carol"))
    assert response.status_code == 200
    assert (await client.post(CHAT, json=HI, headers=by("alice"))).status_code == 200


async def test_names_are_logged_and_counted_and_keys_never(
    make_client: MakeClient, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = make_client(api_keys_file=keys, api_key=("sk-flag",), enable_log_requests=True)
    assert (await client.post(COMPLETIONS, json=PROMPT, headers=by("alice"))).status_code == 200
    assert (await client.post(COMPLETIONS, json=PROMPT, headers=by("flag"))).status_code == 200
    assert (await client.post(COMPLETIONS, json=PROMPT, headers=by("mallory"))).status_code == 401
    page = (await client.get("/metrics")).text
    counts = [line for line in page.splitlines() if line.startswith("quire:key_")]
    assert {line.partition('key="')[2].partition('"')[0] for line in counts} == {"alice"}
    assert any('kind="prompt"' in line and line.endswith(" 1.0") for line in counts)
    printed = "".join(capsys.readouterr())
    lines = [line for line in printed.splitlines() if "request_finished" in line]
    assert len(lines) == 2
    assert "key=alice" in lines[0] and "key=None" in lines[1]
    assert "sk-" not in printed + page


async def test_a_key_that_is_exchanged_keeps_what_its_holder_stored(
    make_client: MakeClient, keys: Path
) -> None:
    client = make_client(api_keys_file=keys)
    body = {"model": MODEL, "input": "hi"}
    stored = (await client.post("/v1/responses", json=body, headers=by("alice"))).json()["id"]
    state = client.app.state.quire  # type: ignore[attr-defined]
    keys.write_text("alice: sk-exchanged\nbob: sk-bob")
    state.keys.ring.replace(state.key_source._read())
    path = f"/v1/responses/{stored}"
    statuses = {
        name: (await client.get(path, headers=by(name))).status_code
        for name in ("alice", "exchanged", "bob", "root")
    }
    assert statuses == {"alice": 401, "exchanged": 200, "bob": 404, "root": 401}


async def test_a_key_that_becomes_invalid_while_its_request_runs_does_no_harm(
    make_client: MakeClient, engine: FakeEngineClient, keys: Path
) -> None:
    engine.hold = asyncio.Event()
    client = make_client(api_keys_file=keys)
    body = {"model": MODEL, "input": "hi"}
    running = asyncio.create_task(client.post("/v1/responses", json=body, headers=by("alice")))
    async with asyncio.timeout(5):
        while not engine.requests:
            await asyncio.sleep(0.001)
    state = client.app.state.quire  # type: ignore[attr-defined]
    keys.write_text("bob: sk-bob")
    state.keys.ring.replace(state.key_source._read())
    engine.hold.set()
    assert (await running).status_code == 200
    response = await client.post("/v1/responses", json=body, headers=by("alice"))
    assert response.status_code == 401


def salts(engine: FakeEngineClient) -> list[str | None]:
    return [request.cache_salt for request in engine.requests]


@pytest.mark.parametrize(
    ("settings", "apart"),
    [
        ({"api_key": ("sk-a",)}, False),
        ({"api_key": ("sk-a", "sk-b")}, True),
        ({"api_key": ("sk-a",), "admin_api_key": "sk-b"}, True),
        ({"api_key": ("sk-a", "sk-b"), "prefix_cache_isolation": "none"}, False),
        ({"api_key": ("sk-a",), "prefix_cache_isolation": "key"}, True),
        ({"admin_api_key": "sk-b"}, False),
        ({}, False),
    ],
)
async def test_prompts_are_cached_by_key_if_there_are_several(
    make_client: MakeClient, engine: FakeEngineClient, settings: dict[str, Any], apart: bool
) -> None:
    client = make_client(**settings)
    calls: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, PROMPT),
        (CHAT, HI),
        ("/v1/responses", {"model": MODEL, "input": "hi"}),
        (MESSAGES, MESSAGE),
    ]
    for path, body in calls:
        assert (await client.post(path, json=body, headers=by("a"))).status_code == 200
    [own] = set(salts(engine))
    assert (own is not None) == apart
    for salt in ("x", "y", own or "key"):
        await client.post(CHAT, json={**HI, "cache_salt": salt}, headers=by("a"))
    assert len(set(salts(engine))) == 4  # the client's own salts still tell its prompts apart
    if apart:
        engine.requests.clear()
        for salt in (None, "x", own):
            await client.post(CHAT, json={**HI, "cache_salt": salt}, headers=by("b"))
        assert own not in salts(engine) and len(salts(engine)) in (0, 3)
        assert all(salt is not None and "sk-" not in salt for salt in salts(engine))


async def test_forwarded_requests_are_counted_once(make_client: MakeClient, keys: Path) -> None:
    client = make_client(api_keys_file=keys, limit_requests_per_minute=2)
    app = client.app  # type: ignore[attr-defined]
    sent: list[dict[str, Any]] = []
    received: list[bool] = []

    async def receive() -> dict[str, Any]:
        if received:
            await asyncio.Event().wait()
        received.append(True)
        return {"type": "http.request", "body": json.dumps(PROMPT).encode(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"authorization", b"Bearer sk-alice"), (b"content-type", b"application/json")]
    scope = httpx.URL("http://quire" + COMPLETIONS)
    for _ in range(3):
        received.clear()
        await app(
            {
                "type": "http",
                "method": "POST",
                "path": scope.path,
                "raw_path": scope.raw_path,
                "query_string": b"",
                "headers": headers,
                "http_version": "1.1",
                "asgi": {"version": "3.0"},
                "state": {"forwarded": True},
            },
            receive,
            send,
        )
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert [start["status"] for start in starts] == [200, 200, 200]
    assert (b"x-ratelimit-remaining-requests", b"2") in starts[2]["headers"]
