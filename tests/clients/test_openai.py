"""The `openai` package against a running server, called as its users call it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from .conftest import KEY, MODEL

QUESTION: list[Any] = [{"role": "user", "content": "What is 12 + 30?"}]
ANSWER = "12 + 30 = 42"
FACTS = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7."
EXTRACT: list[Any] = [{"role": "user", "content": FACTS}]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
LONG: dict[str, Any] = {
    "model": MODEL,
    "input": "Tell me a story about a fox",
    "extra_body": {"ignore_eos": True},
}


class Person(BaseModel):
    name: str
    age: int


class get_weather(BaseModel):  # noqa: N801  (the tool's name)
    """Get the weather of a city"""

    city: str


TOOL: Any = openai.pydantic_function_tool(get_weather)
FLAT_TOOL: Any = {"type": "function", **TOOL["function"]}
CITY = get_weather(city="Paris")
ANNA = Person(name="Anna", age=7)


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models_chat_and_completions(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    whole = client.chat.completions.create(messages=QUESTION, **GREEDY)
    assert whole.choices[0].message.content == ANSWER
    chunks = list(client.chat.completions.create(messages=QUESTION, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    text = client.completions.create(prompt="Once upon", max_tokens=8, **GREEDY)
    pieces = client.completions.create(prompt="Once upon", max_tokens=8, stream=True, **GREEDY)
    assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text != ""


async def test_the_async_client(async_client: openai.AsyncOpenAI) -> None:
    whole = await async_client.chat.completions.create(messages=QUESTION, **GREEDY)
    assert whole.choices[0].message.content == ANSWER
    stream = await async_client.chat.completions.create(messages=QUESTION, stream=True, **GREEDY)
    assert "".join([c.choices[0].delta.content or "" async for c in stream]) == ANSWER
    async with async_client.chat.completions.stream(messages=QUESTION, **GREEDY) as events:
        final = await events.get_final_completion()
    assert final.choices[0].message.content == ANSWER
    response = await async_client.responses.create(input="What is 12 + 30?", **GREEDY)
    assert response.output_text == ANSWER


def test_the_stream_helper_yields_content_logprobs_and_usage(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        messages=QUESTION, logprobs=True, stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event for event in events if event.type == "content.delta"]
    assert "".join(event.delta for event in deltas) == deltas[-1].snapshot == ANSWER
    assert {"chunk", "logprobs.content.delta", "content.done"} <= {event.type for event in events}
    logprobs = final.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and final.usage is not None
    assert len(logprobs.content) == final.usage.completion_tokens


def test_parse_gives_a_model(client: openai.OpenAI) -> None:
    whole = client.chat.completions.parse(messages=EXTRACT, response_format=Person, **GREEDY)
    with client.chat.completions.stream(
        messages=EXTRACT, response_format=Person, **GREEDY
    ) as stream:
        (done,) = [event for event in stream if event.type == "content.done"]
    assert whole.choices[0].message.parsed == done.parsed == ANNA
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            messages=EXTRACT, response_format=Person, max_tokens=2, **GREEDY
        )


def test_tools_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.parse(messages=WEATHER, tools=[TOOL], **GREEDY)
    (call,) = whole.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == CITY
    with client.chat.completions.stream(messages=WEATHER, tools=[TOOL], **GREEDY) as stream:
        events = list(stream)
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    deltas = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert "".join(event.arguments_delta for event in deltas) == call.function.arguments
    (done,) = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert (done.name, done.parsed_arguments) == ("get_weather", CITY)
    assert streamed.function.parsed_arguments == CITY
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'}
    turns = [*WEATHER, whole.choices[0].message.to_dict(), result]
    last = client.chat.completions.create(messages=turns, tools=[TOOL], **GREEDY)
    assert last.choices[0].message.content == "The weather in Paris is sunny."


def test_responses_are_created_streamed_parsed_and_followed(client: openai.OpenAI) -> None:
    whole = client.responses.create(input="What is 12 + 30?", **GREEDY)
    assert (whole.status, whole.output_text) == ("completed", ANSWER)
    assert client.responses.retrieve(whole.id).output == whole.output
    with client.responses.stream(input="What is 12 + 30?", **GREEDY) as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == ANSWER
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    parsed = client.responses.parse(input=FACTS, text_format=Person, **GREEDY)
    assert parsed.output_parsed == ANNA
    called = client.responses.create(input=WEATHER, tools=[FLAT_TOOL], **GREEDY)
    (call,) = called.output
    assert call.type == "function_call" and json.loads(call.arguments) == CITY.model_dump()
    result: Any = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": '{"weather": "sunny"}',
    }
    last = client.responses.create(
        input=[result], previous_response_id=called.id, tools=[FLAT_TOOL], **GREEDY
    )
    assert last.output_text == "The weather in Paris is sunny."
    client.responses.delete(last.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last.id)


def test_responses_in_the_background_are_cancelled_or_end(client: openai.OpenAI) -> None:
    running = client.responses.create(background=True, **LONG)
    assert running.status in ("queued", "in_progress")
    assert client.responses.cancel(running.id).status == "cancelled"
    assert client.responses.retrieve(running.id).status == "cancelled"
    short = client.responses.create(input="What is 12 + 30?", background=True, **GREEDY)
    deadline = time.monotonic() + 30
    while short.status in ("queued", "in_progress") and time.monotonic() < deadline:
        time.sleep(0.05)
        short = client.responses.retrieve(short.id)
    assert (short.status, short.output_text) == ("completed", ANSWER)


def test_refusals_raise_the_packages_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=QUESTION)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=QUESTION, top_p=2)
    assert (bad.value.type, bad.value.param) == ("invalid_request_error", "top_p")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
