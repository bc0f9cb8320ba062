"""Which tools a model may call, and the forms in which its calls are returned."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from quire.server.text.tokenizer import Tokenizer

from ..conftest import MakeClient
from ..fakes import FakeEngineClient, Script, ids, prompt_text, say
from ..openai_http import CHAT, HI, assert_error, stream
from .test_forced_calls import HERMES_CALL, OTHER, accepts
from .test_tool_calls import ARGUMENTS, CALL, SCHEMA, TOOL, TWO, chat

FUNCTIONS = [{"name": "weather", "parameters": SCHEMA}]
CUSTOM = {"type": "custom", "custom": {"name": "shell", "description": "Runs a command."}}
COMMAND = 'echo "ä\n</tool_call>" 🎉'
CUSTOM_CALL = HERMES_CALL.format("shell", json.dumps({"input": COMMAND}))


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.fixture
def sdk(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://quire/v1", api_key="x", max_retries=0, http_client=client
    )


# -- allowed tools ---------------------------------------------------------------------------


async def test_only_allowed_tools_are_shown(
    sdk: openai.AsyncOpenAI, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    choice: Any = allowed("auto", "other")
    await sdk.chat.completions.create(**HI, tools=[TOOL, OTHER], tool_choice=choice)  # type: ignore[list-item]
    text = prompt_text(engine, tokenizer)
    assert '"other"' in text and "weather" not in text
    assert engine.requests[-1].grammar is None
    custom = {"type": "custom", "custom": {"name": "shell"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [custom]}}
    await sdk.chat.completions.create(**HI, tools=[TOOL, CUSTOM], tool_choice=choice)  # type: ignore[list-item]
    assert "Runs a command." in prompt_text(engine, tokenizer)


async def test_one_of_the_allowed_tools_may_be_required(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    await chat(client, tools=[TOOL, OTHER], tool_choice=allowed("required", "other"))
    grammar = engine.requests[-1].grammar
    assert grammar is not None
    other = HERMES_CALL.format("other", "{}")
    assert accepts(tokenizer, grammar, other) and accepts(tokenizer, grammar, f"{other}\n{other}")
    assert not accepts(tokenizer, grammar, HERMES_CALL.format("weather", '{"city": "Ulm"}'))


@pytest.mark.parametrize(
    "choice",
    [
        allowed("auto"),
        allowed("none", "weather"),
        allowed("auto", "nonesuch"),
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL]}},
        {**allowed("auto", "weather"), "mode": "auto"},
    ],
)
async def test_bad_lists_of_allowed_tools(client: httpx.AsyncClient, choice: Any) -> None:
    response = await client.post(CHAT, json={**HI, "tools": [TOOL], "tool_choice": choice})
    assert_error(response, 400, "invalid_value", "tool_choice")


# -- functions -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_functions_are_called_in_the_old_form(
    sdk: openai.AsyncOpenAI, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.scripts = say(TWO)
    whole = await sdk.chat.completions.create(**HI, functions=FUNCTIONS)  # type: ignore[arg-type]
    [choice] = whole.choices
    assert choice.finish_reason == "function_call"
    assert choice.message.content == "Let me see." and choice.message.tool_calls is None
    call = choice.message.function_call
    assert call is not None and (call.name, call.arguments) == ("weather", ARGUMENTS)
    assert '"weather"' in prompt_text(engine, tokenizer)
    chunks = await sdk.chat.completions.create(**HI, functions=FUNCTIONS, stream=True)  # type: ignore[call-overload]
    name, arguments, reasons = "", "", []
    async for chunk in chunks:
        [one] = chunk.choices
        assert one.delta.tool_calls is None
        if one.delta.function_call is not None:
            name += one.delta.function_call.name or ""
            arguments += one.delta.function_call.arguments or ""
        reasons.append(one.finish_reason)
    assert (name, arguments) == ("weather", ARGUMENTS)
    assert reasons[-1] == "function_call" and set(reasons[:-1]) == {None}
    plain = await sdk.chat.completions.create(
        **HI,
        functions=FUNCTIONS,  # type: ignore[arg-type]
        function_call="none",
    )
    assert plain.choices[0].message.content == TWO and plain.choices[0].finish_reason == "stop"


async def test_a_function_may_be_required_by_name(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.scripts = say(CALL)
    functions = [*FUNCTIONS, {"name": "other"}]
    choice = await chat(client, functions=functions, function_call={"name": "weather"})
    assert choice["finish_reason"] == "function_call"
    grammar = engine.requests[-1].grammar
    assert grammar is not None and accepts(tokenizer, grammar, CALL)
    assert not accepts(tokenizer, grammar, HERMES_CALL.format("other", "{}"))


async def test_earlier_calls_in_the_old_form_reach_the_prompt(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    called = {"name": "weather", "arguments": '{"city": "Ulm"}'}
    messages = [
        *HI["messages"],
        {"role": "assistant", "content": None, "function_call": called},
        {"role": "function", "name": "weather", "content": "rain"},
    ]
    await chat(client, messages=messages, functions=FUNCTIONS)
    text = prompt_text(engine, tokenizer)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>' in text
    assert "<|im_start|>tool\nrain<|im_end|>" in text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": FUNCTIONS, "tools": [TOOL]}, "functions"),
        ({"functions": FUNCTIONS, "tool_choice": "auto"}, "functions"),
        ({"functions": FUNCTIONS, "function_call": "required"}, "function_call"),
        ({"functions": FUNCTIONS, "function_call": {"name": "x"}}, "function_call"),
        ({"function_call": {"name": "weather"}}, "function_call"),
        ({"functions": FUNCTIONS * 2}, "functions"),
        ({"functions": [{"name": "a b"}]}, "functions[0].name"),
    ],
)
async def test_bad_functions(client: httpx.AsyncClient, fields: Any, param: str) -> None:
    assert_error(await client.post(CHAT, json={**HI, **fields}), 400, "invalid_value", param)


# -- custom tools ----------------------------------------------------------------------------


async def test_a_custom_tool_gets_a_text(
    sdk: openai.AsyncOpenAI, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.scripts = say(f"{CUSTOM_CALL}\n{CALL}")
    tools: Any = [TOOL, CUSTOM]
    engine.max_model_len = engine.num_blocks = 2048
    answer = await sdk.chat.completions.create(**HI, tools=tools)
    [choice] = answer.choices
    first, second = choice.message.tool_calls or ()
    assert first.type == "custom" and second.type == "function"
    assert (first.custom.name, first.custom.input) == ("shell", COMMAND)
    assert second.function.arguments == ARGUMENTS
    assert choice.finish_reason == "tool_calls"
    # What was answered is accepted as an earlier turn.
    messages = [
        *HI["messages"],
        choice.message,
        {"role": "tool", "tool_call_id": first.id, "content": "done"},
        {"role": "tool", "tool_call_id": second.id, "content": "rain"},
    ]
    await sdk.chat.completions.create(**{**HI, "messages": messages}, tools=tools)
    call = {"name": "shell", "arguments": {"input": COMMAND}}
    assert json.dumps(call, ensure_ascii=False) in prompt_text(engine, tokenizer)


async def test_custom_calls_are_streamed_like_whole_answers(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    fields: dict[str, Any] = {"tools": [TOOL, CUSTOM], "n": 2}
    engine.max_model_len = engine.num_blocks = 2048
    for text in (f"{CUSTOM_CALL}\n{CALL}", f"So:\n{CALL}\n{CUSTOM_CALL}\n{CUSTOM_CALL}"):
        engine.scripts = lambda request, choice, text=text: Script(  # type: ignore[misc]
            ids(text), chunk=1 + 6 * choice
        )
        whole = (await client.post(CHAT, json={**HI, **fields})).json()["choices"]
        chunks = await stream(client, CHAT, **HI, **fields)
        for index, choice in enumerate(whole):
            calls: list[dict[str, Any]] = []
            for chunk in chunks:
                [one] = chunk["choices"]
                for part in one["delta"].get("tool_calls", ()) if one["index"] == index else ():
                    if "id" in part:
                        calls.append(part)
                    kind = calls[part["index"]]["type"]
                    if "id" not in part:
                        name = "input" if kind == "custom" else "arguments"
                        calls[part["index"]][kind][name] += part[kind][name]
            assert [call[call["type"]] for call in calls] == [
                call[call["type"]] for call in choice["message"]["tool_calls"]
            ]
            assert COMMAND in [call.get("custom", {}).get("input") for call in calls]


async def test_a_custom_call_that_was_cut_keeps_what_came(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say(CUSTOM_CALL)
    cut = CUSTOM_CALL.index("echo") + 4
    choice = await chat(client, tools=[CUSTOM], max_tokens=cut)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["custom"]["input"] == "echo"


async def test_a_custom_tool_may_be_required(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    choice = {"type": "custom", "custom": {"name": "shell"}}
    await chat(client, tools=[TOOL, CUSTOM], tool_choice=choice)
    grammar = engine.requests[-1].grammar
    call = HERMES_CALL.format("shell", '{"input": "ls"}')
    assert grammar is not None and accepts(tokenizer, grammar, call)
    assert not accepts(tokenizer, grammar, CALL)


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "custom"}, "tools[0].custom"),
        ({"type": "function", "custom": {"name": "x"}}, "tools[0].function"),
        ({"type": "custom", "custom": {}}, "tools[0].custom.name"),
        (
            {"type": "custom", "custom": {"name": "x", "format": {"type": "grammar"}}},
            "tools[0].custom.format.type",
        ),
    ],
)
async def test_bad_custom_tools(client: httpx.AsyncClient, tool: Any, param: str) -> None:
    response = await client.post(CHAT, json={**HI, "tools": [tool]})
    assert_error(response, 400, "invalid_value", param)


# -- defaults --------------------------------------------------------------------------------


async def test_types_may_be_left_out(
    make_client: MakeClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    client = make_client(strict=True)
    messages = [
        {"role": "user", "content": [{"text": "What is it like?"}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "weather"}}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"text": "rain"}, {"text": "snow"}]},
    ]
    await chat(client, messages=messages, tools=[{"function": TOOL["function"]}], user="")
    text = prompt_text(engine, tokenizer)
    assert "user\nWhat is it like?" in text and "tool\nrain\nsnow" in text
    assert '"name": "weather", "arguments": {}' in text
