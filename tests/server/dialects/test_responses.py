from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from quire.engine.outputs import RowError
from quire.server.text.tokenizer import Tokenizer

from ..conftest import MODEL, MakeClient
from ..fakes import FakeEngineClient, Script, ids, prompt_text, say
from ..openai_http import assert_error
from .dialect import Dialect, assert_nothing_runs

PATH = "/v1/responses"
HI: dict[str, Any] = {"model": MODEL, "input": "hi"}
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
ARGUMENTS = '{"city": "Zürich 🎉"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
API = Dialect(PATH, HI, Response, TypeAdapter(ResponseStreamEvent))
create, stream, events_of = API.create, API.stream, API.events_of


def without_ids(value: Any) -> Any:
    """Remove ids, times and the fields that the SDK adds from a response."""
    if isinstance(value, dict):
        ids = ("id", "item_id", "call_id", "created_at", "completed_at")
        added = ("parsed", "parsed_arguments")
        return {key: without_ids(item) for key, item in value.items() if key not in ids + added}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
async def sdk(served: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{served}/v1", api_key="secret", max_retries=0
    ) as client:
        yield client


async def test_a_whole_answer(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    answer = await create(
        client, instructions="Be brief", max_output_tokens=20, temperature=0.5, top_p=0.9,
        metadata={"a": "b"}, user="u", seed=3, stop=["!"],
    )  # fmt: skip
    [item] = answer["output"]
    assert item["content"] == [{"type": "output_text", "text": "Hello, world", "annotations": []}]
    assert (answer["status"], answer["error"], answer["incomplete_details"]) == (
        "completed", None, None
    )  # fmt: skip
    assert (answer["metadata"], answer["user"], answer["instructions"]) == (
        {"a": "b"}, "u", "Be brief"
    )  # fmt: skip
    params = engine.requests[0].sampling_params
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (20, 0.5, 0.9, 3)
    usage = answer["usage"]
    assert usage["input_tokens"] == len(engine.requests[0].prompt_token_ids)
    assert usage["input_tokens_details"]["cached_tokens"] == 3
    assert usage["output_tokens"] == len("Hello, world") + 1
    assert prompt_text(engine, tokenizer) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


async def test_resolved_defaults_are_returned(client: httpx.AsyncClient) -> None:
    answer = await create(client)
    assert (answer["temperature"], answer["top_p"], answer["store"]) == (1.0, 1.0, True)


async def test_items_become_one_conversation(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.max_model_len = 2048
    items = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"},
                                     {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [],
         "content": [{"type": "reasoning_text", "text": "R"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "rain"},
        {"type": "function_call_output", "call_id": "2",
         "output": [{"type": "input_text", "text": "sun"}]},
        {"role": "assistant", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]  # fmt: skip
    await create(client, input=items)
    text = prompt_text(engine, tokenizer).replace("<|im_start|>", "")
    call = '<tool_call>{"name": "weather", "arguments": '
    turns = text.split("<|im_end|>\n")
    assert turns[:2] == ["system\nD", "user\na\nb"]
    assert turns[2].startswith("assistant\nc") and turns[2].count(call) == 2
    assert turns[3:] == ["tool\nrain", "tool\nsun", "assistant\nx", "assistant\ny", "assistant\n"]


async def test_calls_text_and_reasoning_are_items(
    client: httpx.AsyncClient, make_client: MakeClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say(f"<think>why</think>Let me see.\n{CALL}\n{CALL}")
    client = make_client(reasoning_parser="qwen3", tool_call_parser="hermes")
    answer = await create(client, tools=[TOOL], tool_choice="auto")
    reasoning, message, first, second = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "why"}]
    assert message["content"][0]["text"] == "Let me see."
    assert first["call_id"] != second["call_id"]
    for call in (first, second):
        assert (call["name"], call["arguments"]) == ("weather", ARGUMENTS)
    assert answer["tools"] == [TOOL]
    assert (answer["tool_choice"], answer["status"]) == ("auto", "completed")


@pytest.mark.parametrize(
    "script",
    [say("Hello, 🎉"), say(f"<think>why</think>So:\n{CALL}\n{CALL}"), say(""), say("x" * 600)],
)
async def test_a_stream_adds_up_to_the_whole_answer(
    make_client: MakeClient, engine: FakeEngineClient, script: Any
) -> None:
    client = make_client(reasoning_parser="qwen3", tool_call_parser="hermes")
    engine.scripts = script
    whole = await create(client, tools=[TOOL])
    events = await stream(client, tools=[TOOL])
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    assert without_ids(last["response"]) == without_ids(whole)
    for index, item in enumerate(last["response"]["output"]):
        of_item = [event for event in events if event.get("output_index") == index]
        assert of_item[0]["type"] == "response.output_item.added"
        assert of_item[0]["item"]["status"] == "in_progress"
        assert of_item[-1]["type"] == "response.output_item.done"
        assert of_item[-1]["item"] == item
        deltas = "".join(event["delta"] for event in of_item if "delta" in event)
        if item["type"] == "function_call":
            assert deltas == item["arguments"]
        else:
            assert deltas == item["content"][0]["text"]
            kinds = [event["type"] for event in of_item]
            assert kinds[1] == "response.content_part.added"
            assert kinds[-2] == "response.content_part.done"
        ids = {event["item_id"] for event in of_item if "item_id" in event}
        assert ids <= {item["id"]}


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_cut_answer_is_incomplete(
    client: httpx.AsyncClient, engine: FakeEngineClient, streamed: bool
) -> None:
    fields = {"max_output_tokens": 3}
    if streamed:
        answer = (await stream(client, **fields))[-1]["response"]
    else:
        answer = await create(client, **fields)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["output"][0]["content"][0]["text"] == "Hel"


async def test_logprobs(client: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.scripts = say("é<")
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = await create(client, **fields)
    entries = answer["output"][0]["content"][0]["logprobs"]
    assert [entry["bytes"] for entry in entries] == [
        [0xC3], [0xA9], [ord("<")], list(b"<|im_end|>")
    ]  # fmt: skip
    assert len(entries[0]["top_logprobs"]) == 2
    events = await stream(client, **fields)
    streamed = [entry for event in events if event["type"] == "response.output_text.delta"
                for entry in event["logprobs"]]  # fmt: skip
    assert streamed == entries
    assert "logprobs" not in (await create(client))["output"][0]["content"][0]


async def test_formats_and_effort_reach_the_chat(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    answer = await create(client, text=text)
    assert answer["text"]["format"] == text["format"]
    assert engine.requests[-1].grammar is not None
    await create(client, text={"format": {"type": "json_object"}})
    assert engine.requests[-1].grammar is not None
    await create(client, text={"format": {"type": "text"}}, reasoning={"effort": "none"})
    assert engine.requests[-1].grammar is None
    assert prompt_text(engine, tokenizer).endswith("<think></think>")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": ["x"]}, "input"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///x"}]}]},
     "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
     "input[0].content[0].text"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
    ({"input": [{"type": ["x"]}]}, "input[0].type"),
    ({"instructions": 3}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": "3"}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"seed": 1.5}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"background": True, "stream": True}, "background"),
    ({"background": True, "store": False}, "background"),
    ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"metadata": dict.fromkeys(map(str, range(17)), "x")}, "metadata"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{**TOOL, "parameters": {"type": "array"}}]}, "tools[0].parameters"),
    ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 3}}}},
     "text.format"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:60])
async def test_bad_fields_are_named(
    client: httpx.AsyncClient, engine: FakeEngineClient, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(PATH, json={**HI, **fields})
    assert_error(response, 400, "invalid_value", param)
    message = response.json()["error"]["message"]
    assert not any(name in message for name in ("messages", "completion", "response_format"))
    assert engine.requests == []
    assert_nothing_runs(client, engine)


async def test_unknown_fields_and_long_input(
    make_client: MakeClient, engine: FakeEngineClient
) -> None:
    items = [{"role": "user", "content": "hi", "colour": 1}]
    fields = {**HI, "input": items, "tools": [{**TOOL, "x": 1}], "mood": 1}
    response = await make_client().post(PATH, json=fields)
    assert response.status_code == 200
    named = set(response.headers["x-quire-ignored-params"].split(", "))
    assert named == {"mood", "tools[0].x", "input[0].colour"}
    response = await make_client(strict=True).post(PATH, json={**HI, "input": items})
    assert_error(response, 400, "invalid_value", "input[0].colour")
    response = await make_client().post(PATH, json={**HI, "input": "x" * 600})
    assert_error(response, 400, "context_length_exceeded", "input")
    response = await make_client(strict=True).post(PATH, json={**HI, "max_output_tokens": 600})
    assert_error(response, 400, "context_length_exceeded", "max_output_tokens")
    response = await make_client().post(PATH, json={**HI, "model": "other"})
    assert_error(response, 404, "model_not_found", "model")


@pytest.mark.parametrize("delay", [0.0, 0.1])
async def test_a_failure_is_a_status_or_the_last_event(
    make_client: MakeClient, engine: FakeEngineClient, delay: float
) -> None:
    client = make_client(sse_keepalive_interval=0.05)
    engine.scripts = lambda request, choice: Script(
        ids("ab"), finish="error", error=RowError("non_finite_logits", "NaN"), delay=delay
    )
    response = await client.post(PATH, json=HI)
    assert_error(response, 500, "non_finite_logits", None)
    response = await client.post(PATH, json={**HI, "stream": True})
    events = events_of(response.text)
    assert events[-1]["type"] == "response.failed"
    failed = events[-1]["response"]
    assert failed["error"] == {"code": "server_error", "message": "non_finite_logits: NaN"}
    assert failed["output"][0]["status"] == "incomplete"
    again = (await client.get(f"{PATH}/{failed['id']}")).json()
    assert again == failed


async def test_a_failure_before_the_first_event_has_its_status(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = lambda request, choice: Script(
        [], finish="error", error=RowError("queue_timeout", "late")
    )
    response = await client.post(PATH, json={**HI, "stream": True})
    assert_error(response, 503, "queue_timeout", None)


async def test_the_sdk(sdk: openai.AsyncOpenAI, engine: FakeEngineClient) -> None:
    whole = await sdk.responses.create(**HI)
    assert whole.output_text == "Hello, world"
    assert (await sdk.responses.retrieve(whole.id)).output_text == "Hello, world"
    more = await sdk.responses.create(**{**HI, "previous_response_id": whole.id})
    await sdk.responses.delete(whole.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(whole.id)
    assert (await sdk.responses.retrieve(more.id)).status == "completed"
    engine.scripts = say("x" * 300, delay=0.01)
    running = await sdk.responses.create(**HI, background=True)
    assert (await sdk.responses.cancel(running.id)).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as bad:
        await sdk.responses.create(**HI, temperature=3)
    assert bad.value.param == "temperature"


@pytest.mark.parametrize("delay", [0.0, 0.08])
async def test_the_sdk_accumulates_a_stream(
    sdk: openai.AsyncOpenAI, engine: FakeEngineClient, delay: float
) -> None:
    engine.scripts = say(f"Let me see.\n{CALL}", delay=delay, chunk=40)
    whole = await sdk.responses.create(**HI, tools=[TOOL])  # type: ignore[list-item]
    snapshots = []
    async with sdk.responses.stream(**HI, tools=[TOOL]) as events:  # type: ignore[list-item]
        async for event in events:
            if event.type in (
                "response.output_text.delta",
                "response.function_call_arguments.delta",
            ):
                snapshots.append(event.snapshot)
        final = await events.get_final_response()
    assert snapshots[-1] == ARGUMENTS
    assert final.output_text == whole.output_text == "Let me see."
    streamed = without_ids(final.to_dict(mode="json")["output"])
    assert streamed == without_ids(whole.to_dict(mode="json")["output"])
    assert final.usage == whole.usage


async def test_a_disconnect_aborts_a_stream(
    sdk: openai.AsyncOpenAI, engine: FakeEngineClient
) -> None:
    engine.scripts = say("x" * 300, delay=0.01)
    async with await sdk.responses.create(**HI, stream=True) as events:
        async for event in events:
            if event.type == "response.output_text.delta":
                break
    async with asyncio.timeout(3):
        while engine.running:
            await asyncio.sleep(0.01)
    assert engine.aborted
