"""Compare docs/api.md with the server: every endpoint, parameter, error, flag and example."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from quire.engine import errors as tree
from quire.engine import sampling_params
from quire.engine.errors import QuireError, StartupError
from quire.server import flags_table
from quire.server.api import logprobs
from quire.server.api.embeddings import EmbeddingBody
from quire.server.api.translation import PASSED_ON, ConversationBody
from quire.server.dialects import messages_body, responses_body
from quire.server.errors import answer_of
from quire.server.http import body, event_log, http_protocol, resumption
from quire.server.requests import field_types, job, protocol, sampling
from quire.server.requests.unsupported import _ASKS_FOR_NOTHING as ASKS_FOR_NOTHING
from quire.server.requests.unsupported import _HINTS as HINTS
from quire.server.scoring.classify import ClassifyBody
from quire.server.scoring.rerank import RerankBody, ScoreBody
from quire.server.settings import Settings, load_settings

from .documents import ROOT, code, tables
from .server.conftest import make_app
from .server.fakes import CHAT_TEMPLATE, FakeEngineClient, byte_tokenizer

API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
PATHS = {"C": "/v1/completions", "H": "/v1/chat/completions"}
BODIES: dict[str, dict[str, Any]] = {
    "C": {"prompt": "a"},
    "H": {"messages": [{"role": "user", "content": "a"}]},
}
MODELS: dict[str, type[BaseModel]] = {"C": protocol.CompletionBody, "H": protocol.ChatBody}


def _table(*columns: str) -> list[dict[str, str]]:
    (found,) = (table for table in tables(API) if tuple(table[0]) == columns)
    return found


PARAMETERS = _table("parameter", "in", "meaning; default; bounds", "works", "refused")
EXAMPLES = [
    pytest.param(endpoint, row, id=f"{code(row['parameter'])}-{endpoint}")
    for row in PARAMETERS
    for endpoint in row["in"].split()
]
UNSUPPORTED = _table("field", "for", "asks for nothing")
HINT_ROWS = _table("hint", "why it has no effect", "asks for nothing")


@cache
def _app(**settings: Any) -> FastAPI:
    """Return a server with a chat template that reads tools, and a format for their calls."""
    tokenizer = byte_tokenizer(
        CHAT_TEMPLATE + "{% for tool in tools or [] %}{{ tool }}{% endfor %}"
    )
    return make_app(FakeEngineClient(), tokenizer, **{"tool_call_parser": "hermes", **settings})


def _client(**settings: Any) -> httpx.AsyncClient:
    app = _app(**settings)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://quire")


async def _post(endpoint: str, **fields: Any) -> httpx.Response:
    async with _client() as client:
        return await client.post(PATHS[endpoint], json={**BODIES[endpoint], **fields})


def _numbers(text: str) -> set[int]:
    """Return the integers in a text, whether or not commas separate their thousands."""
    return {
        int(number) for number in re.findall(r"-?\b\d+", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    }


@pytest.mark.parametrize(
    ("path", "model", "refused"),
    [
        ("/v1/responses", responses_body.ResponseBody, responses_body.ASKS_FOR_NOTHING),
        ("/v1/messages", messages_body.MessagesBody, messages_body.ASKS_FOR_NOTHING),
    ],
)
def test_fields_of_other_apis_are_listed(
    path: str, model: type[BaseModel], refused: dict[str, Any]
) -> None:
    listed = {code(row[f"field of {path}"]) for row in _table(f"field of {path}", "meaning")}
    assert listed == model.model_fields.keys() - set(PASSED_ON)
    assert set(PASSED_ON) == ConversationBody.model_fields.keys()
    section = API.split(f"| field of {path} |")[1].split("\n## ")[0]
    assert refused.keys() <= set(re.findall(r"`(\w+)`", section))
    both = API.split("| field of /v1/messages |")[1].split("\n## ")[0]
    assert set(PASSED_ON) <= set(re.findall(r"`(\w+)`", both))


def test_fields_of_embeddings_are_listed() -> None:
    rows = _table("field of /v1/embeddings", "meaning")
    listed = [code(row["field of /v1/embeddings"]) for row in rows]
    assert sorted(listed) == sorted(EmbeddingBody.model_fields)


def test_the_fields_of_rerank_score_and_classify_are_listed() -> None:
    rows = _table("field", "of the body of", "meaning")
    for name, model in (("rerank", RerankBody), ("score", ScoreBody), ("classify", ClassifyBody)):
        listed = [code(row["field"]) for row in rows if name in row["of the body of"].split(", ")]
        assert sorted(listed) == sorted(model.model_fields)


async def test_every_endpoint_is_listed_and_asks_for_its_key() -> None:
    listed = {}
    for row in _table("endpoint", "key", "what it does"):
        method, path = code(row["endpoint"]).split()
        listed[method, path] = row["key"]
    routes = {
        (method, route.path.replace(":path", ""))
        for route in _routes(_app().routes)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert set(listed) == routes
    keys = {"api_key": ("client-key",), "admin_api_key": "admin-key"}
    opened_by = {"none": "", "client": "client-key", "admin": "admin-key", "debug": "admin-key"}
    async with _client(**keys) as locked, _client() as bare:
        for (method, path), key in listed.items():
            url = path.replace("{name}", "tiny")
            refused = await locked.request(method, url, json={})
            assert (refused.status_code == 401) == (key != "none"), path
            headers = {"authorization": f"Bearer {opened_by[key]}"} if opened_by[key] else {}
            opened = await locked.request(method, url, json={}, headers=headers)
            ids = ("{stream_id}", "{response_id}", "{conversation_id}", "{version}")
            expected = (404, 400) if any(each in path for each in ids) else (200, 400)
            assert opened.status_code in expected, path
            without = await bare.request(method, url, json={})
            assert (without.status_code == 401) == (key == "admin"), path


def _routes(routes: Any) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        else:
            # A router that was included without a prefix is an entry of its own in the list.
            yield from _routes(route.original_router.routes)


@pytest.mark.parametrize("endpoint", MODELS)
def test_every_parameter_is_listed(endpoint: str) -> None:
    names = [code(row["parameter"]) for row in PARAMETERS if endpoint in row["in"].split()]
    assert sorted(names) == sorted(MODELS[endpoint].model_fields)


@pytest.mark.parametrize(("endpoint", "row"), EXAMPLES)
async def test_example_works(endpoint: str, row: dict[str, str]) -> None:
    response = await _post(endpoint, **json.loads(code(row["works"])))
    assert response.status_code == 200, response.text
    assert "x-quire-ignored-params" not in response.headers
    assert not response.headers["content-type"].startswith("text/") or "[DONE]" in response.text


@pytest.mark.parametrize(("endpoint", "row"), EXAMPLES)
async def test_example_is_refused_by_name(endpoint: str, row: dict[str, str]) -> None:
    response = await _post(endpoint, **json.loads(code(row["refused"])))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(code(row["parameter"])), error


def test_tokenizer_parameters_are_listed() -> None:
    rows = _table("parameter", "of", "meaning; default")
    by_endpoint: dict[str, set[str]] = {"tokenize": set(), "detokenize": set()}
    for row in rows:
        for endpoint in row["of"].split(", "):
            by_endpoint[endpoint].add(code(row["parameter"]))
    texts: type[BaseModel] = protocol.TokenizeBody
    chats: type[BaseModel] = protocol.TokenizeChatBody
    assert by_endpoint["tokenize"] == texts.model_fields.keys() | chats.model_fields.keys()
    assert by_endpoint["detokenize"] == protocol.DetokenizeBody.model_fields.keys()


def test_unsupported_fields_are_listed_with_what_asks_for_nothing() -> None:
    listed = {
        code(row["field"]): [
            json.loads(text) for text in re.findall("`([^`]*)`", row["asks for nothing"])
        ]
        for row in UNSUPPORTED
    }
    assert listed == {name: list(values) for name, values in ASKS_FOR_NOTHING.items()}


@pytest.mark.parametrize("endpoint", PATHS)
async def test_unsupported_fields_are_refused_by_name(endpoint: str) -> None:
    for row in UNSUPPORTED:
        name = code(row["field"])
        response = await _post(endpoint, **{name: {"anything": 1}})
        assert response.status_code == 400, name
        assert response.json()["error"]["param"] == name
        assert response.json()["error"]["code"] == "invalid_value"
        for text in ["null", *re.findall("`([^`]*)`", row["asks for nothing"])]:
            response = await _post(endpoint, **{name: json.loads(text)})
            assert response.status_code == 200, (name, text)


def test_hints_are_listed_with_what_asks_for_nothing() -> None:
    listed = {
        code(row["hint"]): [
            json.loads(text) for text in re.findall("`([^`]*)`", row["asks for nothing"])
        ]
        for row in HINT_ROWS
    }
    assert listed == {name: list(values) for name, values in HINTS.items()}


@pytest.mark.parametrize("endpoint", PATHS)
async def test_hints_are_named_in_the_header_and_refused_if_strict(endpoint: str) -> None:
    async with _client(strict=True) as strict:
        for row in HINT_ROWS:
            name = code(row["hint"])
            response = await _post(endpoint, **{name: {"anything": 1}})
            assert response.status_code == 200, name
            assert response.headers["x-quire-ignored-params"] == name
            fields = {**BODIES[endpoint], name: {"anything": 1}}
            response = await strict.post(PATHS[endpoint], json=fields)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == name
            for text in ["null", *re.findall("`([^`]*)`", row["asks for nothing"])]:
                fields = {**BODIES[endpoint], name: json.loads(text)}
                response = await strict.post(PATHS[endpoint], json=fields)
                assert response.status_code == 200, (name, text)
                assert "x-quire-ignored-params" not in response.headers


def _section(heading: str) -> str:
    """Return the text from a heading to the next one."""
    match = re.search(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", API, re.M | re.S)
    assert match, heading
    return match[1]


def test_bounds_of_parameters_are_those_of_the_code() -> None:
    meanings = {code(row["parameter"]): row["meaning; default; bounds"] for row in PARAMETERS}
    rows = _table("parameter", "of", "meaning; default")
    meanings |= {code(row["parameter"]): row["meaning; default"] for row in rows[-2:]}
    for parameter, bound in (
        ("messages", protocol.MAX_MESSAGES),
        ("tokens", protocol.MAX_DETOKENIZE),
        ("stop", field_types.MAX_STOP_STRINGS),
        ("stop", field_types.MAX_STOP_LENGTH),
        ("bad_words", field_types.MAX_BAD_WORDS),
        ("bad_words", field_types.MAX_BAD_WORD_LENGTH),
        ("length_penalty", sampling_params.MAX_LENGTH_PENALTY),
        ("cache_salt", field_types.MAX_LABEL_LENGTH),
        ("user", field_types.MAX_LABEL_LENGTH),
        ("logit_bias", sampling_params.MAX_LOGIT_BIAS),
        ("logprob_token_ids", sampling_params.MAX_LOGPROB_TOKEN_IDS),
        ("stop_token_ids", sampling_params.MAX_STOP_TOKEN_IDS),
        ("prompt_logprobs", job.MAX_PROMPT_LOGPROBS),
        ("max_tokens", sampling.COMPLETION_MAX_TOKENS),
    ):
        assert bound in _numbers(meanings[parameter]), (parameter, bound)


def test_other_bounds_are_those_of_the_code() -> None:
    assert {
        body.MAX_NESTING,
        body.MAX_VALUES,
        body.MAX_MEMBERS,
        http_protocol.MAX_HEADERS,
        http_protocol.MAX_HEADER_BYTES // 1024,
    } <= _numbers(_section("Errors"))
    assert {
        event_log.MAX_EVENTS,
        event_log.MAX_BYTES // 2**20,
        resumption.MAX_STREAMS,
        resumption.MAX_TOTAL_BYTES // 2**20,
    } <= _numbers(_section("Streams"))
    assert {logprobs.LOWEST} <= _numbers(_section("Answers"))


def test_every_error_is_listed_with_its_answer() -> None:
    listed = {
        (row["status"], code(row["type"]), code(row["code"]))
        for row in _table("status", "type", "code", "when")
    }
    leaves = [
        error
        for error in vars(tree).values()
        if isinstance(error, type) and issubclass(error, QuireError) and "code" in vars(error)
    ]
    assert listed == {
        (str(answer_of(error("x")).status), answer_of(error("x")).type, error.code)
        for error in leaves
        if not issubclass(error, StartupError) and error is not QuireError
    }


def test_every_flag_is_listed_with_its_default() -> None:
    listed = {
        code(row["flag"])[2:].replace("-", "_"): row["default"]
        for row in _table("flag", "default", "meaning")
    }
    fields = {name: field for name, field in Settings.model_fields.items() if name != "model"}
    assert set(listed) == set(fields)
    spelled = {True: "on", False: "off"}
    for name, field in fields.items():
        default: Any = field.default
        if isinstance(default, bool):
            assert listed[name] == spelled[default], name
        elif default in (None, "", ()):
            assert listed[name] == "–", name
        else:
            assert listed[name] == f"`{default}`", name


def test_table_of_flags_is_up_to_date() -> None:
    assert flags_table.updated(API) == API, "run `make docs`"


def test_the_flags_table_asks_for_its_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["flags_table"])
    with pytest.raises(SystemExit, match="name the document to update"):
        flags_table.main()


def _pins(path: Path) -> dict[str, str]:
    """Return the version of each package of a file of pins."""
    return dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)$", path.read_text(), re.M))


def test_clients_are_listed_with_the_versions_that_make_clients_runs() -> None:
    ours = _pins(ROOT / "configs/constraints.txt")
    folder = ROOT / "tests/clients"
    pins = {path.stem: _pins(path) for path in (folder / "requirements").iterdir()}
    libraries, gateway = pins["libraries"], pins["gateway"]
    node = json.loads((folder / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert {
        row["client"]: row["version"] for row in _table("client", "version", "what is asked")
    } == {
        "`openai` (Python)": ours["openai"],
        "`openai` (Python, 2 series)": libraries["openai"],
        "`openai` (Node)": node["openai"],
        "`anthropic` (Python)": ours["anthropic"],
        **{
            f"`{name}`": libraries[name]
            for name in (
                *("langchain-openai", "langgraph", "litellm", "lm_eval", "instructor", "cohere"),
                *("pydantic-ai-slim", "llama-index-llms-openai-like"),
            )
        },
        "`openai-agents`": gateway["openai-agents"],
        "LiteLLM proxy": gateway["litellm"],
        "`ai` (Node)": node["ai"],
        "`@ai-sdk/openai-compatible` (Node)": node["@ai-sdk/openai-compatible"],
        "Codex CLI": node["@openai/codex"],
        "Claude Code": node["@anthropic-ai/claude-code"],
        "aider": pins["aider"]["aider-chat"],
        "opencode": node["opencode-ai"],
        "Open WebUI": pins["open-webui"]["open-webui"],
    }
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    checks = list(folder.glob("check_*.py"))
    assert checks and all(f"$(CLIENTS)/{path.name}" in makefile for path in checks)


async def test_examples_of_the_readme_are_accepted() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    bodies = [json.loads(text) for text in re.findall(r"-d '(\{.*?\})'", text, re.S)]
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (call,) = (
        node
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".create")
    )
    bodies.append({str(item.arg): ast.literal_eval(item.value) for item in call.keywords})
    assert len(bodies) == 2
    async with _client(served_model_name=load_settings().served_names) as client:
        for fields in bodies:
            response = await client.post(PATHS["H"], json=fields)
            assert response.status_code == 200, response.text
