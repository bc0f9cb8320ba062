"""The `anthropic` package against a running server, called as its users call it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel

from .conftest import KEY, MODEL

ASK: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 60,
    "messages": [{"role": "user", "content": "What is 12 + 30?"}],
    "extra_body": {"temperature": 0},
}
ANSWER = "12 + 30 = 42"
TOOL = {
    "name": "get_weather",
    "description": "Get the weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
WEATHER = ASK | {
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "tools": [TOOL],
}


FACTS = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7."


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture
def client(server: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server, api_key=KEY, max_retries=0) as client:
        yield client


def test_messages_are_created_counted_and_continued(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASK)
    assert [block.text for block in whole.content if block.type == "text"] == [ANSWER]
    assert whole.stop_reason == "end_turn"
    counted = client.messages.count_tokens(model=MODEL, messages=ASK["messages"])
    usage = whole.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    begun = [*ASK["messages"], {"role": "assistant", "content": "12 + 30 ="}]
    continued = client.messages.create(**ASK | {"messages": begun})
    assert [block.text for block in continued.content if block.type == "text"] == [" 42"]
    stopped = client.messages.create(**ASK, stop_sequences=[" ="])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " =")
    assert client.messages.create(**ASK | {"max_tokens": 2}).stop_reason == "max_tokens"


async def test_the_async_client_streams(async_client: anthropic.AsyncAnthropic) -> None:
    async with async_client.messages.stream(**ASK) as stream:
        assert "".join([text async for text in stream.text_stream]) == ANSWER
        final = await stream.get_final_message()
    whole = await async_client.messages.create(**ASK)
    assert final.usage.output_tokens == whole.usage.output_tokens
    events = await async_client.messages.create(**ASK, stream=True)
    assert [event.type async for event in events][-1] == "message_stop"


def test_parse_gives_a_model(client: anthropic.Anthropic) -> None:
    fields = ASK | {"messages": [{"role": "user", "content": FACTS}]}
    parsed = client.messages.parse(**fields, output_format=Person)
    assert parsed.parsed_output == Person(name="Anna", age=7)


def test_tools_whole_streamed_and_answered(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**WEATHER)
    (call,) = whole.content
    assert call.type == "tool_use" and call.input == {"city": "Paris"}
    assert whole.stop_reason == "tool_use"
    with client.messages.stream(**WEATHER) as stream:
        partial = [event.partial_json for event in stream if event.type == "input_json"]
        (streamed,) = stream.get_final_message().content
    assert partial  # drafts may bring all of it at once
    assert streamed.type == "tool_use" and streamed.input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"weather": "sunny"}'}
    turns = [
        *WEATHER["messages"],
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [result]},
    ]
    last = client.messages.create(**WEATHER | {"messages": turns})
    assert [block.text for block in last.content if block.type == "text"] == [
        "The weather in Paris is sunny."
    ]


def test_the_tool_runner_runs_the_tool(client: anthropic.Anthropic) -> None:
    asked = []

    @anthropic.beta_tool(input_schema=TOOL["input_schema"])
    def get_weather(city: str) -> str:
        """Get the weather of a city"""
        asked.append(city)
        return '{"weather": "sunny"}'

    runner = client.beta.messages.tool_runner(**WEATHER | {"tools": [get_weather]})
    (block,) = runner.until_done().content
    assert asked == ["Paris"]
    assert block.type == "text" and block.text == "The weather in Paris is sunny."


def test_refusals_raise_the_packages_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**ASK | {"model": "other"})
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="top_p"):
        client.messages.create(**ASK | {"extra_body": {"top_p": 2}})
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**ASK)
