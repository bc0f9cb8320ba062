"""The tools of agents in Responses, as Codex CLI sends them: functions, custom tools, namespaces,
shells that the client runs, and tools that only OpenAI's servers have."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.dialects.custom_input import CustomInput
from quire.server.text.tokenizer import Tokenizer

from ..conftest import MODEL, MakeClient
from ..fakes import REASONING_TEMPLATE, FakeEngineClient, byte_tokenizer, prompt_text, say
from ..openai_http import assert_error
from .test_responses import PATH, create, stream

GRAMMAR = 'start: "+" /.+/'
FUNCTION: dict[str, Any] = {
    "type": "function",
    "name": "exec",
    "strict": False,
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}},
}
CUSTOM: dict[str, Any] = {
    "type": "custom",
    "name": "patch",
    "description": "Changes files",
    "format": {"type": "grammar", "syntax": "lark", "definition": GRAMMAR},
}
NAMESPACE: dict[str, Any] = {
    "type": "namespace",
    "name": "agents",
    "description": "Helpers",
    "tools": [FUNCTION, {"type": "custom", "name": "note"}],
}
SEARCH: dict[str, Any] = {"type": "tool_search", "execution": "client", "parameters": {
    "type": "object", "properties": {"query": {"type": "string"}}}}  # fmt: skip
TOOLS = [FUNCTION, CUSTOM, NAMESPACE, {"type": "local_shell"}, {"type": "shell"}, SEARCH,
         {"type": "web_search", "external_web_access": True}]  # fmt: skip
CODEX: dict[str, Any] = {
    "model": MODEL,
    "input": [
        {"type": "message", "id": "msg_1", "role": "developer", "content": [
            {"type": "input_text", "text": "Rules"}, {"type": "input_text", "text": "More"}]},
        {"type": "message", "id": "msg_2", "role": "user", "content": [
            {"type": "input_text", "text": "list the files"}]},
    ],
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "low", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "thread-1",
    "text": {"verbosity": "low"},
    "service_tier": "priority",
    "client_metadata": {"turn_id": "1"},
}  # fmt: skip


@pytest.fixture
def tokenizer() -> Tokenizer:
    return byte_tokenizer(REASONING_TEMPLATE)


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(max_model_len=20_000, num_blocks=4096)


@pytest.fixture
def client(make_client: MakeClient) -> httpx.AsyncClient:
    return make_client(reasoning_parser="qwen3", tool_call_parser="hermes")


def call(name: str, arguments: Any) -> str:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'


async def test_codexs_request_is_answered_and_its_hints_are_named(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    response = await client.post(PATH, json=CODEX)
    assert response.status_code == 200, response.text
    assert set(response.headers["x-quire-ignored-params"].split(", ")) == {
        "client_metadata", "reasoning.effort", "reasoning.summary", "service_tier",
        "text.verbosity", "tools[1].format", "tools[6]",
    }  # fmt: skip
    text = prompt_text(engine, tokenizer)
    names = ("exec", "patch", "agents__exec", "agents__note", "local_shell", "shell", "tool_search")
    assert all(f'"function": {{"name": "{name}"' in text for name in names)
    assert text.count('"type": "function"') == len(names)
    assert "web_search" not in text
    assert "agents: Helpers" in text and text.count("Helpers") == 1
    assert "must follow this grammar (lark)" in text and json.dumps(GRAMMAR)[1:-1] in text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [CUSTOM]}, "tools[0].format"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"truncation": "auto"}, "truncation"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}, {"role": "user", "content": "x"}]},
         "input[0]"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAA"},
                    {"role": "user", "content": "x"}]}, "input[0].encrypted_content"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": [
            {"type": "input_image", "image_url": "data:,"}]}]}, "input[0].output[0]"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
async def test_a_hint_is_named_and_refused_only_by_a_strict_server(
    make_client: MakeClient, fields: dict[str, Any], param: str
) -> None:
    formats = {"reasoning_parser": "none", "tool_call_parser": "hermes"}
    body = {"model": MODEL, "input": "hi", **fields}
    response = await make_client(**formats).post(PATH, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["x-quire-ignored-params"] == param
    response = await make_client(**formats, strict=True).post(PATH, json=body)
    assert_error(response, 400, "invalid_value", param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"name": "x"}]}, "tools[0].type"),
        ({"tools": [{**CUSTOM, "format": {"type": "grammar", "syntax": "ebnf"}}]},
         "tools[0].format"),
        ({"tools": [{**NAMESPACE, "tools": [{"type": "function", "name": "a b"}]}]},
         "tools[0].tools[0].name"),
        ({"tools": [{**NAMESPACE, "name": "n" * 126}]}, "tools[0].tools[0].name"),
        ({"tools": [{**NAMESPACE, "tools": [NAMESPACE]}]}, None),
        ({"tools": [FUNCTION, FUNCTION]}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice"),
        ({"conversation": "conv_1"}, "conversation"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
async def test_what_cannot_be_offered_is_refused_by_name(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str | None
) -> None:
    response = await client.post(PATH, json={"model": MODEL, "input": "hi", **fields})
    if param is None:  # a namespace in a namespace is left out, as other unknown tools are
        assert response.headers["x-quire-ignored-params"] == "tools[0].tools[0]"
    else:
        assert_error(response, 400, "invalid_value", param)


@pytest.mark.parametrize("chunk", [1, 5, 10_000])
async def test_a_custom_tool_is_called_with_its_input(
    client: httpx.AsyncClient, engine: FakeEngineClient, chunk: int
) -> None:
    text = '+ "é🎉"\n\\x'
    engine.scripts = say(call("patch", {"input": text}), chunk=chunk)
    events = await stream(client, tools=TOOLS)
    item = events[-1]["response"]["output"][0]
    assert (item["type"], item["name"], item["input"], item["status"]) == (
        "custom_tool_call", "patch", text, "completed"
    )  # fmt: skip
    added, *deltas, done, ended = [event for event in events if "output_index" in event]
    assert added["item"]["input"] == ""
    assert {event["type"] for event in deltas} == {"response.custom_tool_call_input.delta"}
    assert "".join(event["delta"] for event in deltas) == text
    assert (done["type"], done["input"]) == ("response.custom_tool_call_input.done", text)
    assert ended["item"] == item
    whole = await create(client, tools=TOOLS)
    assert whole["output"][0]["input"] == text


async def test_a_namespaces_tools_are_called_by_their_own_names(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.scripts = say(call("agents__exec", {"cmd": "a"}) + call("agents__note", {"input": "b"}))
    answer = await create(client, tools=TOOLS)
    first, second = answer["output"]
    assert (first["type"], first["namespace"], first["name"], first["arguments"]) == (
        "function_call", "agents", "exec", '{"cmd": "a"}'
    )  # fmt: skip
    assert (second["type"], second["namespace"], second["name"], second["input"]) == (
        "custom_tool_call", "agents", "note", "b"
    )  # fmt: skip
    outputs = [
        {"type": "function_call_output", "call_id": first["call_id"], "output": "done"},
        {"type": "custom_tool_call_output", "call_id": second["call_id"], "output": "noted"},
    ]
    await create(client, input=outputs, previous_response_id=answer["id"], tools=TOOLS)
    turns = prompt_text(engine, tokenizer).split("<|im_start|>")
    assert '"name": "agents__exec"' in turns[-4] and '"name": "agents__note"' in turns[-4]
    assert turns[-3:-1] == ["tool\ndone<|im_end|>\n", "tool\nnoted<|im_end|>\n"]


async def test_calls_that_the_client_runs(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    local = {"command": ["ls", "-a"], "timeout_ms": 9}
    engine.scripts = say(
        call("local_shell", local) + call("shell", {"commands": ["pwd"]})
        + call("tool_search", {"query": "maps"})
    )  # fmt: skip
    events = await stream(client, tools=TOOLS)
    first, second, third = events[-1]["response"]["output"]
    assert first["type"] == "local_shell_call"
    assert first["action"] == {
        "type": "exec", "env": {}, "user": None, "working_directory": None, **local
    }  # fmt: skip
    assert second["type"] == "shell_call" and second["action"]["commands"] == ["pwd"]
    assert (third["type"], third["execution"], third["arguments"]) == (
        "tool_search_call", "client", {"query": "maps"}
    )  # fmt: skip
    found = {**FUNCTION, "name": "find_on_map"}
    history = [
        {"role": "user", "content": "hi"}, first, second, third,
        {"type": "local_shell_call_output", "id": first["id"], "output": "a b"},
        {"type": "shell_call_output", "call_id": second["call_id"], "output": [
            {"stdout": "/home", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]},
        {"type": "tool_search_output", "call_id": third["call_id"], "execution": "client",
         "status": "completed", "tools": [found]},
    ]  # fmt: skip
    await create(client, tools=TOOLS, input=history)
    text = prompt_text(engine, tokenizer)
    assert '"command": ["ls", "-a"]' in text and '{"commands": ["pwd"]}' in text
    assert "tool\n/home\nexit code: 0<" in text
    assert '"function": {"name": "find_on_map"' in text


async def test_a_broken_call_is_never_one_that_the_client_would_run(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    text = call("local_shell", {"command": ["rm", "-r", "/tmp/scratch"]})
    engine.scripts = say(text)
    cut = text.index("/tmp/") + len("/tmp/")
    events = await stream(client, tools=TOOLS, max_output_tokens=cut)
    [item] = events[-1]["response"]["output"]
    assert (item["type"], item["name"], item["status"]) == (
        "function_call", "local_shell", "incomplete"
    )  # fmt: skip
    assert item["arguments"].startswith('{"command": ["rm"')


async def test_tool_choices(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    allowed = [{"type": "function", "name": "exec"}, {"type": "web_search"},
               {"type": "function", "name": "exec", "namespace": "agents"}]  # fmt: skip
    choice = {"type": "allowed_tools", "mode": "auto", "tools": allowed}
    answer = await create(client, tools=TOOLS, tool_choice=choice)
    assert answer["tool_choice"] == choice
    text = prompt_text(engine, tokenizer)
    assert text.count('"type": "function"') == 2 and "agents__exec" in text
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}
    await create(client, tools=TOOLS, tool_choice=choice)
    assert '"type": "function"' not in prompt_text(engine, tokenizer)
    for choice in ({"type": "custom", "name": "patch"}, {"type": "shell"}, "required"):
        engine.scripts = say(call("patch", {"input": "+a"}))
        await create(client, tools=TOOLS, tool_choice=choice)
        assert engine.requests[-1].grammar is not None


async def test_sealed_reasoning_comes_back(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.scripts = say("<think>Because é.</think>Yes.")
    answer = await create(client, include=["reasoning.encrypted_content"], store=False)
    reasoning, message = answer["output"]
    assert reasoning["content"][0]["text"] == "Because é."
    counted = answer["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert len("Because é.".encode()) <= counted <= len("<think>Because é.</think>".encode())
    kept = {**reasoning, "content": None}
    await create(client, input=[{"role": "user", "content": "x"}, kept, message])
    assert "<think>Because é.</think>Yes." in prompt_text(engine, tokenizer)
    assert "encrypted_content" not in (await create(client))["output"][0]


async def test_the_sdk_accumulates_custom_calls(served: str, engine: FakeEngineClient) -> None:
    engine.scripts = say(call("patch", {"input": "+é"}), chunk=3)
    async with (
        openai.AsyncOpenAI(base_url=f"{served}/v1", api_key="secret", max_retries=0) as sdk,
        sdk.responses.stream(model=MODEL, input="hi", tools=TOOLS) as events,  # type: ignore[arg-type]
    ):
        deltas = [
            event.delta async for event in events
            if event.type == "response.custom_tool_call_input.delta"
        ]  # fmt: skip
        final = await events.get_final_response()
    assert "".join(deltas) == "+é"
    assert final.output[0].type == "custom_tool_call" and final.output[0].input == "+é"


@given(st.text(), st.integers(1, 9), st.booleans(), st.booleans())
def test_a_custom_input_is_read_however_it_is_cut(
    text: str, size: int, ascii_only: bool, spaced: bool
) -> None:
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
    arguments = f" {arguments} " if spaced else arguments
    for end in (len(arguments), len(arguments) * 2 // 3):
        reader = CustomInput()
        cut = arguments[:end]
        pieces = [reader.feed(cut[at : at + size]) for at in range(0, len(cut), size)]
        read = "".join(pieces) + reader.finish()
        if end == len(arguments):
            assert read == text
        elif cut.strip().startswith('{"input": "'):
            assert text.startswith(read) and "".join(pieces) == read


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"other": 1}', '{"other": 1}'),
        ('{"input": 3}', '{"input": 3}'),
        ('{"a": 1, "input": "x"}', "x"),
        ("{", "{"),
        ("", ""),
        ('{"input": "\\ud83d"}', "\ufffd"),
    ],
)
def test_unusual_arguments_of_a_custom_tool(arguments: str, text: str) -> None:
    reader = CustomInput()
    assert reader.feed(arguments) + reader.finish() == text
