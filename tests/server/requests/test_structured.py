"""Structured outputs: the constraints that reach the engine, and those that are refused."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from quire.engine.outputs import RowError
from quire.engine.request import GrammarSpec
from quire.server.text.grammar_check import MAX_WAITING_OF_ONE, GrammarCheck

from ..conftest import MakeClient
from ..fakes import FakeEngineClient, Script, byte_tokenizer, ids, say

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "p"},
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
}
TAG = {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}
DEADLINE_SECONDS = 1.5
"""A second, plus the time to start the compiling process on a busy machine."""


def schema(value: Any, **fields: Any) -> dict[str, Any]:
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": value, **fields},
        }
    }


def outputs(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


def nested(depth: int) -> Any:
    value: Any = {"type": "integer"}
    for _ in range(depth):
        value = {"items": value}
    return value


@pytest.fixture(scope="module")
def check() -> GrammarCheck:
    return GrammarCheck()


@pytest.fixture
def client(make_client: MakeClient, check: GrammarCheck) -> httpx.AsyncClient:
    """Make a client whose server shares one compiling process with all tests of this file."""
    client = make_client()
    client.app.state.quire.grammar_check = check  # type: ignore[attr-defined]
    return client


ACCEPTED: list[tuple[dict[str, Any], GrammarSpec | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, GrammarSpec("json", '{"type":"object"}')),
    (schema({"type": "integer"}), GrammarSpec("json", '{"type":"integer"}')),
    (
        schema({"type": "null"}, strict=True, description="d"),
        GrammarSpec("json", '{"type":"null"}'),
    ),
    (outputs(json={"type": "null"}), GrammarSpec("json", '{"type":"null"}')),
    (outputs(json='{"type": "null"}'), GrammarSpec("json", '{"type":"null"}')),
    (outputs(regex="[a-z]+", json=None), GrammarSpec("regex", "[a-z]+")),
    (outputs(choice=["yes", "né"]), GrammarSpec("choice", '["yes","né"]')),
    (outputs(grammar='start: "a" | "b"'), GrammarSpec("grammar", 'start: "a" | "b"')),
    (outputs(grammar='root ::= "a" | "b"'), GrammarSpec("grammar", 'root ::= "a" | "b"')),
    (
        {"response_format": {"type": "structural_tag", "triggers": ["<f"], "structures": [TAG]}},
        GrammarSpec("structural_tag", json.dumps({"triggers": ["<f"], "structures": [TAG]})),
    ),
]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("fields", "spec"), ACCEPTED)
async def test_a_structure_reaches_the_engine(
    client: httpx.AsyncClient,
    engine: FakeEngineClient,
    path: str,
    fields: dict[str, Any],
    spec: GrammarSpec | None,
) -> None:
    for stream in (False, True):
        response = await client.post(path, json={**BODIES[path], **fields, "stream": stream})
        assert response.status_code == 200, response.text
        assert "x-quire-ignored-params" not in response.headers
        got = engine.requests[-1].grammar
        if path == CHAT and got is not None:  # the model may reason first
            rules, got = parts_of(got)
            assert rules.startswith("start: (opening reasoning)? ( answer)")
        if spec is not None and spec.kind == "structural_tag":
            assert got is not None and json.loads(got.text) == json.loads(spec.text)
        else:
            assert got == spec


def parts_of(spec: GrammarSpec) -> tuple[str, GrammarSpec]:
    """Return the rules and the answer of a nested grammar."""
    assert spec.kind == "nested"
    parts = json.loads(spec.text)
    return parts["rules"], GrammarSpec(parts["kind"], parts["text"])


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no type", {"response_format": {}}, "response_format.type"),
    ("a list", {"response_format": []}, "response_format"),
    ("unknown type", {"response_format": {"type": "xml"}}, "response_format.type"),
    ("extra key", {"response_format": {"type": "text", "a": 1}}, "response_format.a"),
    (
        "no schema",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    (
        "no name",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    ("strict", schema({}, strict="yes"), "response_format.json_schema.strict"),
    ("boolean schema", schema(True), "response_format.json_schema.schema"),
    ("two kinds", outputs(regex="a", choice=["a"]), "structured_outputs"),
    ("no kind", outputs(), "structured_outputs"),
    ("extra kind", outputs(regex="a", whitespace_pattern=" "), "structured_outputs"),
    ("both parameters", {**outputs(regex="a"), **schema({})}, "structured_outputs"),
    ("with tokens", {**outputs(regex="a"), "allowed_token_ids": [5]}, "allowed_token_ids"),
    ("with bad words", {**outputs(regex="a"), "bad_words": ["b"]}, "bad_words"),
    ("too deep", schema(nested(100)), ""),
    ("too deep in text", outputs(json=json.dumps(nested(500))), "structured_outputs.json"),
    ("far too deep", outputs(json='{"items":' * 5000 + "{}" + "}" * 5000), "structured_outputs"),
    ("text is no JSON", outputs(json="{"), "structured_outputs.json"),
    ("too large", schema({"const": "x" * 70_000}), "response_format.json_schema.schema"),
    ("large enum", schema({"enum": list(range(2000))}), "response_format.json_schema.schema"),
    ("huge enum", schema({"enum": list(range(10**5))}), "response_format.json_schema.schema"),
    ("huge regex", outputs(regex="a" * 9000), "structured_outputs.regex"),
    ("empty regex", outputs(regex=""), "structured_outputs.regex"),
    ("bad regex", outputs(regex="(a"), "structured_outputs.regex"),
    ("look-around", outputs(regex="(?=a)b"), "structured_outputs.regex"),
    ("matches nothing", outputs(regex=r"[^\s\S]"), "structured_outputs.regex"),
    ("no choices", outputs(choice=[]), "structured_outputs.choice"),
    ("empty choice", outputs(choice=["a", ""]), "structured_outputs.choice"),
    ("number choice", outputs(choice=[1]), "structured_outputs.choice"),
    ("2000 choices", outputs(choice=["a"] * 2000), "structured_outputs.choice"),
    ("bad grammar", outputs(grammar="start: foo"), "structured_outputs.grammar"),
    ("bad type", schema({"type": "wat"}), "response_format.json_schema.schema"),
    ("bad keyword", schema({"not": {}}), "response_format.json_schema.schema"),
    ("dangling ref", schema({"$ref": "#/nope"}), "response_format.json_schema.schema"),
    ("endless ref", schema({"$ref": "#"}), "response_format.json_schema.schema"),
    ("impossible", schema({"enum": [1], "type": "null"}), "response_format.json_schema.schema"),
    (
        "tag without trigger",
        {"response_format": {"type": "structural_tag", "triggers": ["#"], "structures": [TAG]}},
        "response_format.structures[0].begin",
    ),
]


@pytest.mark.parametrize(
    ("fields", "param"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
async def test_a_bad_structure_is_refused_by_name(
    client: httpx.AsyncClient, engine: FakeEngineClient, fields: dict[str, Any], param: str
) -> None:
    begin = time.monotonic()
    response = await client.post(COMPLETIONS, json={"prompt": "p", **fields})
    assert time.monotonic() - begin < DEADLINE_SECONDS
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param)
    assert not engine.requests


HOSTILE: dict[str, dict[str, Any]] = {
    "repeats": outputs(regex="(a{1,1000}){1,1000}"),
    "repeats in a schema": schema({"type": "string", "pattern": "(a{1,1000}){1,1000}"}),
    "ambiguous": outputs(regex="(.*a){100}"),
    "multiple": schema({"type": "integer", "multipleOf": 99999999}),
    "multiples": schema({"allOf": [{"type": "integer", "multipleOf": k} for k in (97, 89, 83)]}),
    "all of any": schema({"allOf": [{"anyOf": [{"const": i}, {}]} for i in range(300)]}),
    "long string": schema({"type": "string", "minLength": 10**6}),
    "long list": schema({"type": "array", "minItems": 10**6}),
    "references": schema(
        {
            "$defs": {
                str(i): {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}, {"$ref": f"#/$defs/{i + 1}"}]}
                for i in range(40)
            }
            | {"40": {"type": "null"}},
            "$ref": "#/$defs/0",
        }
    ),
    "derivations": outputs(
        grammar="start: a0\n"
        + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(40))
        + 'a40: "x"'
    ),
    "repetition": outputs(grammar='start: (("a" | "b"){1000}){1000}'),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_pattern_is_decided_quickly_without_blocking_the_event_loop(
    client: httpx.AsyncClient, name: str
) -> None:
    lag, stop = 0.0, False

    async def watch() -> None:
        nonlocal lag
        while not stop:
            begin = time.monotonic()
            await asyncio.sleep(0.005)
            lag = max(lag, time.monotonic() - begin - 0.005)

    watcher = asyncio.create_task(watch())
    begin = time.monotonic()
    response = await client.post(COMPLETIONS, json={"prompt": "p", **HOSTILE[name]})
    seconds = time.monotonic() - begin
    stop = True
    await watcher
    assert response.status_code in (200, 400), response.text
    assert seconds < DEADLINE_SECONDS
    assert lag < 0.3
    if name.startswith("multiple"):
        assert "compile" in response.json()["error"]["message"]


async def test_the_compiler_works_again_after_a_hostile_schema(client: httpx.AsyncClient) -> None:
    hostile = client.post(COMPLETIONS, json={"prompt": "p", **HOSTILE["multiple"]})
    fine = client.post(COMPLETIONS, json={"prompt": "p", **outputs(regex="[0-9]{3}")})
    answers = await asyncio.gather(hostile, fine)
    assert [answer.status_code for answer in answers] == [400, 200]


async def test_nothing_is_fetched(client: httpx.AsyncClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        seen: list[object] = []

        def listen() -> None:
            server.settimeout(1.0)
            try:
                seen.append(server.accept())
            except TimeoutError:
                return

        listener = threading.Thread(target=listen)
        listener.start()
        ref = {"$ref": f"http://127.0.0.1:{port}/schema.json"}
        response = await client.post(COMPLETIONS, json={"prompt": "p", **schema(ref)})
        listener.join()
    assert response.status_code == 400
    assert not seen


async def test_a_structured_answer_is_content_even_if_it_looks_like_a_call(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    text = '{"a": "<think>x</think>"}'
    engine.scripts = say(text)
    body = {**BODIES[CHAT], "response_format": {"type": "json_object"}}
    answer = (await client.post(CHAT, json=body)).json()
    assert answer["choices"][0]["message"]["content"] == text


async def test_a_failed_grammar_has_its_own_error_code(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    error = RowError("grammar_failed", "no token continues it")
    engine.scripts = lambda request, choice: Script(ids("{"), finish="error", error=error)
    body = {"prompt": "p", **outputs(regex="a")}
    response = await client.post(COMPLETIONS, json=body)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "grammar_failed"


async def test_verdicts_are_cached_and_the_process_ends_on_close() -> None:
    check = GrammarCheck()
    asked = 0

    def read_tokenizer() -> str:
        nonlocal asked
        asked += 1
        return str(byte_tokenizer().backend.to_str())

    async def ask(text: str) -> None:
        await check.check(
            GrammarSpec("regex", text),
            "p",
            read_tokenizer=read_tokenizer,
            vocab_size=258,
            eos_token_ids=[257],
        )

    await ask("a")
    child = check._child
    assert child is not None and child.poll() is None
    begin = time.monotonic()
    for _ in range(1000):
        await ask("a")
    assert time.monotonic() - begin < 0.5
    check.close()
    assert child.poll() is not None
    await ask("a")  # the verdict is cached, so no process is needed
    assert asked == 1
    await ask("b")
    assert asked == 2
    check.close()


async def test_a_flood_of_grammars_holds_up_nobody_else(
    make_client: MakeClient, engine: FakeEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_client().app  # type: ignore[attr-defined]
    tried: list[str] = []

    def ask(self: GrammarCheck, spec: GrammarSpec, start: Any) -> tuple[str | None, bool]:
        time.sleep(0.2)
        tried.append(spec.text)
        return None, True

    monkeypatch.setattr(GrammarCheck, "_ask", ask)
    leave = asyncio.Event()
    statuses: list[int] = []

    async def post(number: int, address: str) -> None:
        fields = {"model": "tiny", "prompt": "p", "max_tokens": 1, **outputs(regex=f"a{number}")}
        parts: list[Any] = [{"type": "http.request", "body": json.dumps(fields).encode()}]

        async def receive() -> Any:
            if parts:
                return parts.pop()
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b""}
        await app({**scope, "headers": headers, "client": (address, 1)}, receive, send)

    flood = [asyncio.create_task(post(number, "10.0.0.1")) for number in range(200)]
    # 1. One client may have only so many grammars waiting.
    async with asyncio.timeout(5):
        while len(statuses) < 200 - 3 - MAX_WAITING_OF_ONE:
            await asyncio.sleep(0.01)
    assert set(statuses) == {429} and len(statuses) < 200 - MAX_WAITING_OF_ONE
    del tried[:]
    # 2. Another client's turn comes next.
    await post(1000, "10.0.0.2")
    assert len(tried) <= 3 and statuses[-1] == 200
    # 3. What waits for clients that have left is dropped.
    leave.set()
    await asyncio.wait_for(asyncio.gather(*flood), 2)
    await asyncio.sleep(0.3)
    assert len(tried) <= 5
    leave.clear()
    await asyncio.wait_for(post(2000, "10.0.0.1"), 1)
    assert statuses[-1] == 200
