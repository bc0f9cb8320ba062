"""The newest `openai` 2.x, which other packages still depend on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from .conftest import KEY, MODEL

QUESTION: list[Any] = [{"role": "user", "content": "What is 12 + 30?"}]
ANSWER = "12 + 30 = 42"
FACTS = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7."
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


class Person(BaseModel):
    name: str
    age: int


class get_weather(BaseModel):  # noqa: N801  (the tool's name)
    """Get the weather of a city"""

    city: str


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_the_package_is_of_the_2_series() -> None:
    assert openai.__version__.startswith("2.")


def test_chat_and_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    whole = client.chat.completions.create(messages=QUESTION, **GREEDY)
    assert whole.choices[0].message.content == ANSWER
    chunks = client.chat.completions.create(messages=QUESTION, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    text = client.completions.create(prompt="Once upon", max_tokens=8, **GREEDY).choices[0].text
    pieces = client.completions.create(prompt="Once upon", max_tokens=8, stream=True, **GREEDY)
    assert "".join(piece.choices[0].text for piece in pieces) == text != ""


async def test_the_async_client(async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(messages=QUESTION, stream=True, **GREEDY)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ANSWER


def test_parse_and_tools(client: openai.OpenAI) -> None:
    facts: list[Any] = [{"role": "user", "content": FACTS}]
    parsed = client.chat.completions.parse(messages=facts, response_format=Person, **GREEDY)
    assert parsed.choices[0].message.parsed == Person(name="Anna", age=7)
    tools: Any = [openai.pydantic_function_tool(get_weather)]
    with client.chat.completions.stream(messages=WEATHER, tools=tools, **GREEDY) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == get_weather(city="Paris")


def test_responses(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(input=FACTS, text_format=Person, **GREEDY)
    assert parsed.output_parsed == Person(name="Anna", age=7)
    with client.responses.stream(input="What is 12 + 30?", **GREEDY) as stream:
        assert stream.get_final_response().output_text == ANSWER


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=QUESTION)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
