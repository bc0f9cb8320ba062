"""Bad bodies, bad headers and failing parts, and the answer to each.

docs/faults.md lists them. Bad values of fields have a file of their own, test_bad_fields.py.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from quire.engine.outputs import RowError
from quire.server.http.body import MAX_MEMBERS, MAX_NESTING, MAX_VALUES

from .conftest import MakeClient
from .fakes import FakeEngineClient, Script, ids, say
from .openai_http import CHAT, COMPLETIONS, HI, PROMPT, assert_error

DEEP = 100_000
BAD_JSON = {
    "syntax": b'{"model": ',
    "nan": b'{"model": "tiny", "prompt": "p", "temperature": NaN}',
    "infinity": b'{"model": "tiny", "prompt": "p", "temperature": -Infinity}',
    "1e999": b'{"model": "tiny", "prompt": "p", "temperature": 1e999}',
    "digits": b'{"prompt": [' + b"9" * 5000 + b"]}",
    "latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "utf-16": '{"prompt": "p"}'.encode("utf-16"),
    "empty": b"",
    "lists": b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "just-over": b'{"a":' * (MAX_NESTING + 1) + b"1" + b"}" * (MAX_NESTING + 1),
    "values": b'{"prompt": [' + b"1," * (MAX_VALUES + 1) + b"1]}",
    "members": json.dumps(dict.fromkeys(map(str, range(MAX_MEMBERS + 1)), 1)).encode(),
    "list": b"[]",
    "null": b"null",
    "string": b'"x"',
    "duplicate": b'{"prompt": "a", "prompt": "b"}',
    "nested": b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}',
    "surrogate": b'{"model": "tiny", "prompt": "a\\ud800b"}',
    "surrogate-key": b'{"prompt": "p", "\\udfff": 1}',
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON.keys())
async def test_bad_json_is_400(
    client: httpx.AsyncClient, engine: FakeEngineClient, body: bytes
) -> None:
    response = await client.post(
        COMPLETIONS, content=body, headers={"content-type": "application/json"}
    )
    assert_error(response, 400, "invalid_value", None)
    assert engine.requests == []


@pytest.mark.parametrize("length", ["whole", "chunked"])
async def test_large_bodies_are_413(
    make_client: MakeClient, engine: FakeEngineClient, length: str
) -> None:
    client = make_client(max_body_bytes=1000)
    body = json.dumps({**PROMPT, "prompt": "x" * 1000}).encode()

    async def chunks() -> Any:
        for at in range(0, len(body), 100):
            yield body[at : at + 100]

    response = await client.post(
        COMPLETIONS,
        content=body if length == "whole" else chunks(),
        headers={"content-type": "application/json"},
    )
    assert_error(response, 413, "body_too_large", None)
    assert engine.requests == []


async def test_a_truncated_body_never_reaches_the_engine(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    parts = [
        {"type": "http.request", "body": b'{"model": "tiny", "prompt": "p"', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return parts.pop(0)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
    }  # fmt: skip
    await make_client().app(scope, receive, send)  # type: ignore[attr-defined]
    assert sent[0]["status"] == 499
    assert engine.requests == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_other_content_types_are_415(client: httpx.AsyncClient, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = await client.post(COMPLETIONS, content=json.dumps(PROMPT), headers=headers)
    assert_error(response, 415, "unsupported_media_type", None)


async def test_unknown_routes_and_methods(client: httpx.AsyncClient) -> None:
    assert_error(await client.get("/v1/nothing"), 404, "not_found", None)
    response = await client.get(COMPLETIONS)
    assert_error(response, 405, "method_not_allowed", None)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("sent", ["a\tb", "x" * 2**20, "a b", "é", ""])
async def test_strange_request_ids_are_replaced(client: httpx.AsyncClient, sent: str) -> None:
    response = await client.get("/version", headers={"x-request-id": sent.encode()})
    assert response.headers["x-request-id"] != sent
    assert len(response.headers["x-request-id"]) == 32


async def test_a_tiny_temperature_is_greedy_and_nul_is_a_token(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    fields = {**PROMPT, "prompt": "a\0b", "temperature": 1e-8}
    response = await client.post(COMPLETIONS, json=fields)
    assert response.status_code == 200
    assert engine.requests[0].sampling_params.greedy
    assert list(engine.requests[0].prompt_token_ids) == ids("a\0b")


async def test_requests_that_can_never_fit_the_kv_cache_are_refused(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.num_blocks = 2
    response = await client.post(COMPLETIONS, json={**PROMPT, "max_tokens": 33})
    assert_error(response, 400, "kv_pool_too_small", "max_tokens")
    assert engine.requests == []


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_an_unknown_model_is_404(client: httpx.AsyncClient, path: str) -> None:
    fields = PROMPT if path == COMPLETIONS else HI
    response = await client.post(path, json={**fields, "model": "other"})
    assert_error(response, 404, "model_not_found", "model")


async def test_unknown_fields_are_named_or_refused(make_client: MakeClient) -> None:
    fields = {**HI, "mood": 1, "stream_options": {"x": 1}, "stream": True, "a\r\nb": 2}
    fields["messages"] = [{"role": "user", "content": "hi", "colour": 1}]
    response = await make_client().post(CHAT, json=fields)
    assert response.status_code == 200
    assert set(response.headers["x-quire-ignored-params"].split(", ")) == {
        "mood", "stream_options.x", "messages[0].colour", "?"
    }  # fmt: skip
    response = await make_client(strict=True).post(CHAT, json={**HI, "mood": 1})
    assert_error(response, 400, "invalid_value", "mood")


async def test_values_that_ask_for_nothing_are_accepted(client: httpx.AsyncClient) -> None:
    fields = {
        **HI, "response_format": {"type": "text"}, "tools": [], "user": "",
        "reasoning_effort": None, "stop": None, "suffix": None, "use_beam_search": False,
    }  # fmt: skip
    response = await client.post(CHAT, json=fields)
    assert response.status_code == 200, response.text
    assert "x-quire-ignored-params" not in response.headers


async def test_equal_request_ids_get_different_internal_ids(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    for _ in range(2):
        response = await client.post(COMPLETIONS, json=PROMPT, headers={"x-request-id": "mine"})
        assert response.headers["x-request-id"] == "mine"
        assert response.json()["id"] == "cmpl-mine"
    first, second = engine.requests
    assert first.request_id != second.request_id


async def test_a_request_id_in_the_body_wins_and_is_echoed(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json={**HI, "request_id": "body-1"})
    assert response.headers["x-request-id"] == "body-1"
    assert response.json()["id"] == "chatcmpl-body-1"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_during_generation_is_504(
    client: httpx.AsyncClient, engine: FakeEngineClient, stream: bool
) -> None:
    engine.scripts = say("x", delay=5)
    response = await client.post(COMPLETIONS, json={**PROMPT, "timeout": 0.05, "stream": stream})
    assert_error(response, 504, "request_timeout", None)
    assert not engine.running
    request = engine.requests[0]
    assert request.deadline == pytest.approx(request.arrival_time + 0.05)
    assert request.queue_deadline == request.deadline


async def test_a_deadline_in_a_stream_is_an_error_event(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say("x" * 100, delay=0.04)
    response = await client.post(CHAT, json={**HI, "timeout": 0.1, "stream": True, "n": 2})
    *chunks, error, done = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(error[6:])["error"]["code"] == "request_timeout"
    ends = [json.loads(chunk[6:])["choices"][0] for chunk in chunks[-2:]]
    assert [(end["index"], end["finish_reason"]) for end in ends] == [(0, "error"), (1, "error")]
    assert not engine.running


@pytest.mark.parametrize(
    ("code", "status"),
    [("non_finite_logits", 500), ("step_failed", 500), ("device_out_of_memory", 503),
     ("queue_timeout", 503), ("engine_dead", 500)],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_of_one_request(
    client: httpx.AsyncClient, engine: FakeEngineClient, code: str, status: int, stream: bool
) -> None:
    engine.scripts = lambda request, choice: Script(
        [], finish="error", error=RowError(code, "why"), delay=0.01 * choice
    )
    response = await client.post(CHAT, json={**HI, "stream": stream, "n": 2})
    assert_error(response, status, code, None)
    assert ("retry-after" in response.headers) == (status == 503)
    assert not engine.running


async def test_an_engine_that_is_not_ready_is_503(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.ready = False
    response = await client.post(COMPLETIONS, json=PROMPT)
    assert_error(response, 503, "engine_not_ready", None)
    assert int(response.headers["retry-after"]) >= 1
    for path in ("/ready", "/health", "/ping"):
        assert_error(await client.get(path), 503, "engine_not_ready", None)
    assert (await client.get("/live")).json() == {"status": "ok", "reason": "it loads"}


async def test_a_draining_server_refuses_requests_but_stays_alive(
    make_client: MakeClient,
) -> None:
    client = make_client()
    client.app.state.quire.begin_drain()  # type: ignore[attr-defined]
    refused = [await client.get(path) for path in ("/ready", "/health", "/ping")]
    for response in (await client.post(COMPLETIONS, json=PROMPT), *refused):
        assert_error(response, 503, "shutting_down", None)
        assert int(response.headers["retry-after"]) >= 1
    assert (await client.get("/live")).status_code == 200


async def test_only_routes_and_served_names_become_labels(
    client: httpx.AsyncClient,
) -> None:
    await client.post(COMPLETIONS, json={**PROMPT, "model": 'x"} 1\n'})
    await client.get("/v1/inject%22%7D")
    await client.post(COMPLETIONS, json=PROMPT)
    page = (await client.get("/metrics")).text
    assert "inject" not in page
    assert 'handler="/v1/completions"' in page
    assert 'handler="unmatched"' in page
    labels = 'engine="0",model_name="tiny",reason="model_not_found"'
    assert f"quire:admission_rejections_total{{{labels}}} 1.0" in page
    assert 'finished_reason="stop",model_name="tiny"} 1.0' in page


async def test_an_unexpected_exception_is_500_without_its_text(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a secret")

    engine.stats = broken  # type: ignore[method-assign]
    for stream in (False, True):
        response = await client.post(COMPLETIONS, json={**PROMPT, "stream": stream})
        assert_error(response, 500, "internal_error", None)
        assert "secret" not in response.text
        assert response.headers["x-request-id"] in response.json()["error"]["message"]
