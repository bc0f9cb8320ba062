"""LiteLLM as a client, through its providers for OpenAI-compatible servers."""

from __future__ import annotations

from typing import Any

import litellm
import pytest
from pydantic import BaseModel

from .conftest import KEY, MODEL

QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]
ANSWER = "12 + 30 = 42"
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
FACTS = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(params=["openai", "hosted_vllm"])
def target(server: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Arguments of a call: the provider's model, the server and its key, sent as a Bearer token."""
    model = f"{request.param}/{MODEL}"
    return {"model": model, "api_base": f"{server}/v1", "api_key": KEY, "temperature": 0}


def test_completion_whole_and_streamed(target: dict[str, Any]) -> None:
    whole = litellm.completion(messages=QUESTION, **target)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens > 5
    chunks = list(litellm.completion(messages=QUESTION, stream=True, **target))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_acompletion(target: dict[str, Any]) -> None:
    stream = await litellm.acompletion(messages=QUESTION, stream=True, **target)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ANSWER


def test_structure_and_tools(target: dict[str, Any]) -> None:
    facts = [{"role": "user", "content": FACTS}]
    answer = litellm.completion(messages=facts, response_format=Person, **target)
    parsed = Person.model_validate_json(answer.choices[0].message.content)
    assert parsed == Person(name="Anna", age=7)
    whole = litellm.completion(messages=WEATHER, tools=[TOOL], **target)
    chunks = list(litellm.completion(messages=WEATHER, tools=[TOOL], stream=True, **target))
    for built in (whole, litellm.stream_chunk_builder(chunks)):
        (call,) = built.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        assert call.function.arguments == '{"city": "Paris"}'


@pytest.mark.parametrize("provider", ["text-completion-openai", "hosted_vllm"])
def test_text_completion(server: str, provider: str) -> None:
    target = {"model": f"{provider}/{MODEL}", "api_base": f"{server}/v1", "api_key": KEY}
    fields: dict[str, Any] = {**target, "prompt": "Once upon", "max_tokens": 8, "temperature": 0}
    text = litellm.text_completion(**fields).choices[0].text
    pieces = litellm.text_completion(**fields, stream=True)
    assert "".join(piece.choices[0].text or "" for piece in pieces) == text != ""


def test_errors(target: dict[str, Any]) -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=QUESTION, **target | {"api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=QUESTION, **target | {"model": "openai/other"})
    with pytest.raises(litellm.BadRequestError, match="top_p"):
        litellm.completion(messages=QUESTION, top_p=2, **target)
