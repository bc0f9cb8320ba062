"""Tool calls and reasoning in chat completions, over HTTP and through the OpenAI SDK."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from quire.server.parsing.formats.message_format import MessageFormat
from quire.server.parsing.message_events import MessageBuilder
from quire.server.parsing.message_parser import MessageParser
from quire.server.settings import load_settings
from quire.server.text.tokenizer import Tokenizer

from ..conftest import MakeClient, app_client, make_app
from ..fakes import (
    CHAT_TEMPLATE,
    IM_END,
    FakeEngineClient,
    Script,
    byte_tokenizer,
    ids,
    prompt_text,
    say,
)
from ..openai_http import CHAT, HI, stream

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
DONE = "tool_calls.function.arguments.done"
ARGUMENTS = '{"city": "</tool_call> Zürich \\" 🎉"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
TWO = f"Let me see.\n{CALL}\n" + '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>'


async def chat(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(CHAT, json={**HI, **fields})
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate(response.json())
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


async def refusal(client: httpx.AsyncClient, **fields: Any) -> tuple[str, str]:
    response = await client.post(CHAT, json={**HI, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


@pytest.fixture
def sdk(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://quire/v1", api_key="x", max_retries=0, http_client=client
    )


async def test_calls_in_a_whole_answer(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.scripts = say(TWO)
    choice = await chat(client, tools=[TOOL])
    message = choice["message"]
    assert message["content"] == "Let me see."
    assert choice["finish_reason"] == "tool_calls"
    first, second = message["tool_calls"]
    assert first == {
        "id": first["id"],
        "type": "function",
        "function": {"name": "weather", "arguments": ARGUMENTS},
    }
    assert second["function"] == {"name": "other", "arguments": "{}"}
    assert first["id"] != second["id"]
    assert json.dumps(TOOL) in prompt_text(engine, tokenizer)
    # An answer without text has null as its content.
    engine.scripts = say(CALL)
    assert (await chat(client, tools=[TOOL]))["message"]["content"] is None


async def test_calls_in_a_stream(client: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.scripts = lambda request, choice: Script(ids(TWO), chunk=1 + 4 * choice)
    chunks = await stream(client, CHAT, **HI, tools=[TOOL], n=3)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    for index in range(3):
        choices = [chunk["choices"][0] for chunk in chunks]
        mine = [choice for choice in choices if choice["index"] == index]
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == [
            "tool_calls"
        ]
        assert mine[-1]["finish_reason"]
        deltas = [choice["delta"] for choice in mine]
        assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        begun = [call for call in calls if "id" in call]
        assert [call["index"] for call in begun] == [0, 1]
        assert [call["function"] for call in begun] == [
            {"name": "weather", "arguments": ""},
            {"name": "other", "arguments": ""},
        ]
        assert all(call["type"] == "function" for call in begun)
        texts = ["", ""]
        for call in calls:
            texts[call["index"]] += call["function"]["arguments"]
            assert "id" in call or set(call) == {"index", "function"}
        assert texts == [ARGUMENTS, "{}"]
        if index == 0:  # arguments are streamed as they are generated
            assert len(calls) > len(ARGUMENTS) / 2


class Weather(BaseModel):
    city: str


class Nothing(BaseModel):
    pass


async def test_the_sdk_reads_calls(sdk: openai.AsyncOpenAI, engine: FakeEngineClient) -> None:
    engine.scripts = say(TWO)
    engine.max_model_len = engine.num_blocks = 2048
    tool = openai.pydantic_function_tool(Weather, name="weather")
    other = openai.pydantic_function_tool(Nothing, name="other")
    fields: dict[str, Any] = {**HI, "tools": [tool, other]}
    whole = await sdk.chat.completions.create(**fields)
    async with sdk.chat.completions.stream(**fields) as events:
        done = [event async for event in events if event.type == DONE]
        final = await events.get_final_completion()
    message = final.choices[0].message
    assert final.choices[0].finish_reason == "tool_calls"
    assert message.content == whole.choices[0].message.content == "Let me see."
    read = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    assert read == [("weather", ARGUMENTS), ("other", "{}")]
    assert read == [
        (call.function.name, call.function.arguments)  # type: ignore[union-attr]
        for call in whole.choices[0].message.tool_calls or ()
    ]
    assert (message.tool_calls or ())[0].function.parsed_arguments == Weather(
        city=json.loads(ARGUMENTS)["city"]
    )
    assert [event.name for event in done] == ["weather", "other"]


async def test_strict_is_reported_as_ignored_if_nothing_enforces_it(
    client: httpx.AsyncClient,
) -> None:
    tool = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    response = await client.post(CHAT, json={**HI, "tools": [TOOL, tool | {}]})
    assert response.status_code == 400  # both have the same name
    response = await client.post(CHAT, json={**HI, "tools": [tool]})
    assert response.headers["x-quire-ignored-params"] == "tools[0].function.strict"


async def test_tool_results_reach_the_prompt(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    call = {"id": "1", "function": {"name": "weather", "arguments": ARGUMENTS}}
    empty = {"id": "2", "type": "function", "function": {"name": "other", "arguments": ""}}
    messages = [
        *HI["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call, empty]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "ok"}]},
    ]
    await chat(client, messages=messages, tools=[TOOL])
    text = prompt_text(engine, tokenizer)
    call_text = json.dumps(
        {"name": "weather", "arguments": json.loads(ARGUMENTS)}, ensure_ascii=False
    )
    assert f"assistant\n<tool_call>{call_text}</tool_call>" in text
    assert '{"name": "other", "arguments": {}}' in text
    assert "tool\nrain" in text and "tool\nok" in text


async def test_templates_that_read_arguments_as_text_get_text(engine: FakeEngineClient) -> None:
    for expression in ("'(' + call.function.arguments + ')'", "'(%s)' % call.function.arguments"):
        template = (
            "{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.function.name + "
            + expression
            + " }}{% endfor %}{% endfor %}"
        )
        tokenizer = byte_tokenizer(template)
        call = {"id": "1", "function": {"name": "f", "arguments": '{"a":  "é<|im_end|>"}'}}
        prompt = await tokenizer.encode_chat(
            [{"role": "assistant", "content": "", "tool_calls": [call]}],
            add_generation_prompt=False,
        )
        assert prompt.token_ids == ids('f({"a":  "é') + ids("<|im_end|>") + ids('"})')


async def test_tool_choice_none_hides_the_tools_from_the_model(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.scripts = say(CALL)
    choice = await chat(client, tools=[TOOL], tool_choice="none")
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"
    assert "weather" not in prompt_text(engine, tokenizer)


async def test_calls_are_plain_text_if_no_tools_are_offered(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say(CALL)
    assert (await chat(client))["message"]["content"] == CALL


async def test_only_the_first_call_is_returned_if_parallel_calls_are_off(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say(TWO)
    choice = await chat(client, tools=[TOOL], parallel_tool_calls=False)
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]


async def test_a_call_cut_by_max_tokens_keeps_its_partial_arguments(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say(CALL)
    count = len(ids(CALL[: CALL.index("rich")]))
    choice = await chat(client, tools=[TOOL], max_tokens=count)
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == ARGUMENTS[: ARGUMENTS.index("rich")]


async def test_logprobs_of_held_back_text_are_not_lost(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say(TWO)
    fields = {"tools": [TOOL], "logprobs": True, "return_token_ids": True}
    choice = await chat(client, **fields)
    chunks = [chunk["choices"][0] for chunk in await stream(client, CHAT, **HI, **fields)]
    entries = [entry for chunk in chunks for entry in (chunk["logprobs"] or {}).get("content", ())]
    assert entries == choice["logprobs"]["content"]
    token_ids = [token for chunk in chunks for token in chunk.get("token_ids", ())]
    assert token_ids == choice["token_ids"] == [*ids(TWO), IM_END]


async def test_tools_that_cannot_be_served_are_refused(
    engine: FakeEngineClient, make_client: MakeClient
) -> None:
    param, message = await refusal(make_client(tool_call_parser="none"), tools=[TOOL])
    assert param == "tools" and "--tool-call-parser" in message
    app = make_app(engine, byte_tokenizer("{{ messages }}"), tool_call_parser="hermes")
    async with app_client(app) as client:
        param, message = await refusal(client, tools=[TOOL])
        assert (param, message) == ("tools", "the chat template does not read tools")
    assert not engine.requests


async def test_tokenize_counts_the_tools(client: httpx.AsyncClient) -> None:
    body = {"messages": HI["messages"], "tools": [TOOL]}
    with_tools = (await client.post("/tokenize", json=body)).json()["count"]
    without = await client.post("/tokenize", json={**body, "tool_choice": "none"})
    assert with_tools > without.json()["count"] + len(json.dumps(TOOL))


# -- control tokens --------------------------------------------------------------------------


async def test_only_control_tokens_that_mark_calls_reach_the_parser(
    engine: FakeEngineClient,
) -> None:
    tokenizer = byte_tokenizer(CHAT_TEMPLATE, ("[TOOL_CALLS]", "[IMG]"))
    special = tokenizer.special_ids
    tokens = [special["[IMG]"], *ids("Hm."), special["[TOOL_CALLS]"], *ids(f"weather{ARGUMENTS}")]
    engine.scripts = lambda request, choice: Script(tokens)
    app = make_app(engine, tokenizer, tool_call_parser="mistral")
    async with app_client(app) as client:
        message = (await chat(client, tools=[TOOL]))["message"]
        assert message["content"] == "Hm."
        [call] = message["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}
        assert call["id"].isalnum() and len(call["id"]) == 9
        assert (await chat(client))["message"]["content"] == f"Hm.weather{ARGUMENTS}"
        shown = await chat(client, skip_special_tokens=False)
        assert shown["message"]["content"].startswith("[IMG]Hm.[TOOL_CALLS]weather")


# -- reasoning -------------------------------------------------------------------------------

THOUGHT = "<think>\nIt is < 3 </thin.\n</think>\n\nIt is 2."


async def test_reasoning_is_the_same_whole_and_streamed(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say(THOUGHT)
    choice = await chat(client)
    message = choice["message"]
    assert message["content"] == "It is 2."
    assert message["reasoning"] == message["reasoning_content"] == "It is < 3 </thin."
    assert choice["finish_reason"] == "stop"
    chunks = await stream(client, CHAT, **HI)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    for name, text in (("content", "It is 2."), ("reasoning", "It is < 3 </thin.")):
        assert "".join(delta.get(name, "") for delta in deltas) == text
    assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in deltas)
    message = (await chat(client, include_reasoning=False))["message"]
    assert message == {"role": "assistant", "content": "It is 2.", "refusal": None}


async def test_reasoning_that_the_prompt_opens_is_recognised(engine: FakeEngineClient) -> None:
    template = CHAT_TEMPLATE.removesuffix("{% endif %}") + "<think>\n{% endif %}"
    app = make_app(engine, byte_tokenizer(template))
    engine.scripts = say("Why not.</think>Yes." + CALL)
    async with app_client(app) as client:
        message = (await chat(client, tools=[TOOL]))["message"]
        assert (message["reasoning"], message["content"]) == ("Why not.", "Yes.")
        assert len(message["tool_calls"]) == 1
        message = (await chat(client, max_tokens=3))["message"]
        assert (message["reasoning"], message["content"]) == ("Why", None)
        answer: dict[str, Any] = {"role": "assistant", "content": "<think>\nWell</think>\nSo"}
        fields = {"messages": [*HI["messages"], answer], "continue_final_message": True}
        message = (await chat(client, **fields))["message"]
        assert message["content"].startswith("Why not.</think>Yes.")


async def test_reasoning_effort_reaches_the_template(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    await chat(client, reasoning_effort="none")
    assert prompt_text(engine, tokenizer).endswith("assistant\n<think></think>")
    await chat(client, reasoning_effort="high")
    assert prompt_text(engine, tokenizer).endswith("assistant\n")
    await chat(client, reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})
    assert prompt_text(engine, tokenizer).endswith("<think></think>")
    other = byte_tokenizer("{{ reasoning_effort }}{{ messages[0].content }}")
    app = make_app(engine, other)
    async with app_client(app) as client:
        await chat(client, reasoning_effort="minimal")
    assert prompt_text(engine, other) == "minimalhi"


async def test_earlier_reasoning_reaches_the_template(engine: FakeEngineClient) -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m.content }}{{ m.reasoning_content }}{% endfor %}"
    )
    app = make_app(engine, tokenizer)
    async with app_client(app) as client:
        for name in ("reasoning", "reasoning_content"):
            await chat(client, messages=[{"role": "assistant", "content": "x", name: "so"}])
            assert prompt_text(engine, tokenizer) == "xso"


# -- the demo model's own template -----------------------------------------------------------


async def test_calls_in_the_demo_template_are_parsed_back() -> None:
    tokenizer = Tokenizer.load(load_settings().model_path)
    format = MessageFormat.of(load_settings(), tokenizer.chat_template)
    assert (format.tool_format, format.reasoning) == ("hermes", None)
    calls = [
        {"id": str(number), "function": {"name": "f", "arguments": arguments}}
        for number, arguments in enumerate((ARGUMENTS, '{"b": [1, {"c": null}]}'))
    ]
    message = {"role": "assistant", "content": "Wait.", "tool_calls": calls}
    prompt = await tokenizer.encode_chat([message], add_generation_prompt=False)
    text = await tokenizer.decode(prompt.token_ids, skip_special_tokens=True)
    parser: MessageParser = format.parser(
        {"f": {}}, prompt_end="", continued=None, show_reasoning=True, parallel_calls=True
    )
    builder = MessageBuilder()
    builder.add(parser.feed(text.removeprefix("assistant\n").rstrip()) + parser.finish())
    read = builder.message()
    assert read["content"] == "Wait."
    for call, original in zip(read["tool_calls"], calls, strict=True):
        assert json.loads(call["function"]["arguments"]) == json.loads(
            original["function"]["arguments"]  # type: ignore[index]
        )
