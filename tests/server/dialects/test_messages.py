from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from quire.engine.outputs import RowError
from quire.server.text.tokenizer import Tokenizer

from ..conftest import MODEL, MakeClient
from ..fakes import FakeEngineClient, Script, ids, prompt_text, say
from .dialect import Dialect, assert_nothing_runs

PATH = "/v1/messages"
COUNT = f"{PATH}/count_tokens"
HI: dict[str, Any] = {
    "model": MODEL, "max_tokens": 200, "messages": [{"role": "user", "content": "hi"}]
}  # fmt: skip
TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "Tells the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🎉"}}\n</tool_call>'
API = Dialect(PATH, HI, Message, TypeAdapter(RawMessageStreamEvent), untyped=("ping", "error"))
create, stream = API.create, API.stream


def assert_refused(
    response: httpx.Response, status: int, kind: str, name: str | None = None
) -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error"} and set(body["error"]) == {"type", "message"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert name is None or name in body["error"]["message"]
    assert response.headers["x-request-id"]


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [
        {key: value for key, value in block.items() if key != "id"} for block in message["content"]
    ]
    return {**message, "id": None, "content": content}


@pytest.fixture
async def sdk(served: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=served, api_key="secret", max_retries=0) as client:
        yield client


async def test_a_whole_answer(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    answer = await create(
        client, system=[{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}},
                        {"type": "text", "text": "brief"}],
        temperature=0.5, top_p=0.9, top_k=7, metadata={"user_id": "u" * 200},
    )  # fmt: skip
    assert answer["content"] == [{"type": "text", "text": "Hello, world", "citations": None}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    params = engine.requests[0].sampling_params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (200, 0.5, 0.9, 7)
    usage = answer["usage"]
    assert usage["cache_read_input_tokens"] == 3
    assert usage["input_tokens"] + 3 == len(engine.requests[0].prompt_token_ids)
    assert usage["output_tokens"] == len("Hello, world") + 1
    assert prompt_text(engine, tokenizer) == (
        "<|im_start|>system\nBe\nbrief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


async def test_blocks_become_one_conversation(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.max_model_len = 2048
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "R", "signature": ""},
            {"type": "text", "text": "c"},
            {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Bern"}},
            {"type": "tool_use", "id": "2", "name": "weather", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": "rain"},
            {"type": "tool_result", "tool_use_id": "2", "is_error": True,
             "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "such"}]},
            {"type": "tool_result", "tool_use_id": "3"},
            {"type": "text", "text": "so?"},
        ]},
    ]  # fmt: skip
    await create(client, messages=messages)
    turns = prompt_text(engine, tokenizer).replace("<|im_start|>", "").split("<|im_end|>\n")
    assert turns[0] == "user\na\nb"
    assert turns[1].startswith('assistant\nc<tool_call>{"name": "weather"')
    assert turns[1].count("<tool_call>") == 2 and "Bern" in turns[1]
    assert turns[2:] == [
        "tool\nrain",
        "tool\nError:\nno\nsuch",
        "tool\n",
        "user\nso?",
        "assistant\n",
    ]


async def test_a_prefilled_answer_is_continued(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    messages = [*HI["messages"], {"role": "assistant", "content": "Once"}]
    await create(client, messages=messages)
    assert prompt_text(engine, tokenizer).endswith("assistant\nOnce")


async def test_stop_reasons(client: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    answer = await create(client, stop_sequences=["wor"])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "wor")
    assert answer["content"][0]["text"] == "Hello, "
    assert (await create(client, max_tokens=3))["stop_reason"] == "max_tokens"
    engine.scripts = say(CALL)
    answer = await create(client, tools=[TOOL])
    assert answer["stop_reason"] == "tool_use"
    [block] = answer["content"]
    assert (block["type"], block["name"], block["input"]) == (
        "tool_use", "weather", {"city": "Zürich 🎉"}
    )  # fmt: skip
    cut = len(CALL[: CALL.index("🎉")].encode())
    answer = await create(client, tools=[TOOL], max_tokens=cut)
    assert (answer["stop_reason"], answer["content"][0]["input"]) == ("max_tokens", {})


@pytest.mark.parametrize(
    "script",
    [say("Hello, 🎉"), say(f"<think>why</think>So:\n{CALL}\n{CALL}"), say(""), say("x" * 300)],
)
async def test_a_stream_adds_up_to_the_whole_answer(
    make_client: MakeClient, engine: FakeEngineClient, script: Any
) -> None:
    client = make_client(reasoning_parser="qwen3", tool_call_parser="hermes")
    engine.scripts = script
    whole = await create(client, tools=[TOOL])
    events = await stream(client, tools=[TOOL])
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message = events[0]["message"]
    assert message["content"] == []
    fields = {"text_delta": "text", "thinking_delta": "thinking"}
    for index in range(len(whole["content"])):
        start, *deltas, stop = [event for event in events if event.get("index") == index]
        assert (start["type"], stop["type"]) == ("content_block_start", "content_block_stop")
        block = start["content_block"]
        arguments = ""
        for delta in (event["delta"] for event in deltas):
            if delta["type"] == "input_json_delta":
                arguments += delta["partial_json"]
            elif delta["type"] == "signature_delta":
                block["signature"] = delta["signature"]
            else:
                block[fields[delta["type"]]] += delta[fields[delta["type"]]]
        if block["type"] == "tool_use":
            block["input"] = json.loads(arguments)
        message["content"].append(block)
    message |= {**events[-2]["delta"], "usage": events[-2]["usage"]}
    assert without_ids(message) == without_ids(whole)


async def test_tool_choice_thinking_and_formats_reach_the_chat(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.max_model_len = 2048
    engine.scripts = say(CALL)
    answer = await create(client, tools=[TOOL], tool_choice={"type": "none"})
    assert answer["content"][0]["type"] == "text"
    engine.scripts = say(f"{CALL}{CALL}")
    for limit, count in ((False, 2), (True, 1)):
        choice = {"type": "auto", "disable_parallel_tool_use": limit}
        answer = await create(client, tools=[TOOL], tool_choice=choice)
        assert len(answer["content"]) == count
    await create(client, thinking={"type": "disabled"})
    assert prompt_text(engine, tokenizer).endswith("<think></think>")
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    config = {"format": {"type": "json_schema", "schema": schema}}
    engine.scripts = say("{}")
    await create(client, output_config=config)
    assert engine.requests[-1].grammar is not None


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {
        "type": "url", "url": "file:///etc/passwd"}}]}]}, "messages[0].content[0].type: 'image'"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
     "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1",
        "content": [{"type": "audio"}]}]}]}, "messages[0].content[0].content[0].type"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"system": 3}, "system"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"temperature": 3}, "temperature"),
    ({"top_k": -5}, "top_k"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
    ({"stream": 1}, "stream"),
    ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{**TOOL, "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
    ({"tools": [TOOL], "tool_choice": {"type": "any of them"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "other"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}],
      "tool_choice": {"type": "tool", "name": "web_search"}}, "tools[0].type"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ({"container": "c"}, "container"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "name"), BAD, ids=lambda value: str(value)[:60])
async def test_bad_fields_are_named(
    client: httpx.AsyncClient, engine: FakeEngineClient, fields: dict[str, Any], name: str
) -> None:
    response = await client.post(PATH, json={**HI, **fields})
    assert_refused(response, 400, "invalid_request_error", name)
    assert engine.requests == []
    assert_nothing_runs(client, engine)


async def test_a_thread_is_refused_with_the_code_that_makes_clients_retry_without_it(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post(PATH, json={**HI, "thread": {"type": "create"}})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"] == "thread is not supported by this server"
    assert error["details"] == {
        "error_code": "thread_unsupported_request",
        "unsupported": ["thread"],
    }


@pytest.mark.parametrize("path", [PATH, COUNT])
async def test_every_error_has_anthropics_shape(make_client: MakeClient, path: str) -> None:
    client = make_client(api_key=("secret",), max_body_bytes=1000)
    key = {"x-api-key": "secret"}
    assert_refused(await client.post(path, json=HI), 401, "authentication_error")
    wrong = await client.post(path, json=HI, headers={"x-api-key": "wrong"})
    assert_refused(wrong, 401, "authentication_error")
    other = await client.post(path, json={**HI, "model": "other"}, headers=key)
    assert_refused(other, 404, "not_found_error", "other")
    assert_refused(await client.get(path, headers=key), 405, "invalid_request_error")
    large = await client.post(path, json={**HI, "system": "x" * 1000}, headers=key)
    assert_refused(large, 413, "request_too_large")
    text = await client.post(path, content="{}", headers={**key, "content-type": "text/plain"})
    assert_refused(text, 415, "invalid_request_error")
    broken = await client.post(
        path, content="{", headers={**key, "content-type": "application/json"}
    )
    assert_refused(broken, 400, "invalid_request_error")
    assert (await client.post(path, json=HI, headers=key)).status_code == 200


async def test_unknown_paths_and_unforeseen_exceptions(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    assert_refused(await client.post(f"{PATH}/batches", json={}), 404, "not_found_error")
    engine.stats = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    assert_refused(await client.post(PATH, json=HI), 500, "api_error")
    response = await client.post("/v1/chat/completions", json={"messages": HI["messages"]})
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_failures(make_client: MakeClient, engine: FakeEngineClient) -> None:
    client = make_client(sse_keepalive_interval=0.02)
    engine.scripts = lambda request, choice: Script(
        ids("ab"), finish="error", error=RowError("non_finite_logits", "NaN"), delay=0.05
    )
    assert_refused(await client.post(PATH, json=HI), 500, "api_error", "NaN")
    events = await stream(client)
    assert [event["type"] for event in events].count("ping") > 1
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "NaN"}}
    engine.ready = False
    response = await client.post(PATH, json={**HI, "stream": True})
    assert_refused(response, 503, "overloaded_error")
    assert int(response.headers["retry-after"]) >= 1


async def test_unknown_fields_are_named(make_client: MakeClient) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi", "colour": 1}]}]
    fields = {**HI, "messages": messages, "mood": 1, "tools": [{**TOOL, "x": 1}]}
    response = await make_client().post(PATH, json=fields)
    assert response.status_code == 200
    assert set(response.headers["x-quire-ignored-params"].split(", ")) == {
        "mood", "tools[0].x", "messages[0].content[0].colour"
    }  # fmt: skip
    response = await make_client(strict=True).post(PATH, json={**HI, "messages": messages})
    assert_refused(response, 400, "invalid_request_error", "messages[0].content[0].colour")


async def test_counting_tokens(client: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    fields = {**HI, "system": "S", "tools": [TOOL]}
    del fields["max_tokens"]
    count = (await client.post(COUNT, json=fields)).json()["input_tokens"]
    assert engine.requests == []
    await create(client, **fields)
    assert count == len(engine.requests[0].prompt_token_ids)


async def test_the_sdk(sdk: anthropic.AsyncAnthropic, engine: FakeEngineClient) -> None:
    whole = await sdk.messages.create(**HI)
    assert whole.content[0].type == "text" and whole.content[0].text == "Hello, world"
    fields = {name: HI[name] for name in ("model", "messages")}
    counted = await sdk.messages.count_tokens(**fields)
    assert counted.input_tokens == len(engine.requests[0].prompt_token_ids)
    with pytest.raises(anthropic.BadRequestError, match="temperature") as bad:
        await sdk.messages.create(**HI, extra_body={"temperature": 3})
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(anthropic.AuthenticationError):
        await sdk.with_options(api_key="wrong").messages.create(**HI)
    engine.scripts = lambda request, choice: Script(
        ids("ab"), finish="error", error=RowError("step_failed", "why"), delay=0.1
    )
    with pytest.raises(anthropic.APIStatusError, match="why"):
        async with sdk.messages.stream(**HI) as events:
            await events.get_final_message()


@pytest.mark.parametrize("delay", [0.0, 0.08])
async def test_the_sdk_accumulates_a_stream(
    sdk: anthropic.AsyncAnthropic, engine: FakeEngineClient, delay: float
) -> None:
    engine.scripts = say(f"Let me see.\n{CALL}", delay=delay, chunk=40)
    whole = await sdk.messages.create(**HI, tools=[TOOL])  # type: ignore[list-item]
    async with sdk.messages.stream(**HI, tools=[TOOL]) as events:  # type: ignore[list-item]
        text = "".join([piece async for piece in events.text_stream])
        final = await events.get_final_message()
    assert text == "Let me see."
    parts = [message.to_dict(mode="json", exclude_none=True) for message in (whole, final)]
    for part in parts:
        for block in part["content"]:  # type: ignore[attr-defined]
            block.pop("parsed_output", None)
    assert without_ids(parts[0]) == without_ids(parts[1])
    assert final.content[1].type == "tool_use" and final.content[1].input == {"city": "Zürich 🎉"}
