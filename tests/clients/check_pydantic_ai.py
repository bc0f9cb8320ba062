"""Pydantic AI: agents with tools, structured output, streams, by chat and by responses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import (
    Agent,
    AgentRunResultEvent,
    ModelRetry,
    NativeOutput,
    PartDeltaEvent,
    TextPartDelta,
    ToolOutput,
)
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from .conftest import KEY, MODEL
from .scripted import SCRIPTED, ScriptedModel, call

FACTS = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7."
KINDS = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}


class Weather(BaseModel):
    """The weather of a city"""

    city: str
    degrees: int


class Person(BaseModel):
    """A person"""

    name: str
    age: int


ANNA = Person(name="Anna", age=7)


def _model(kind: str, address: str, name: str) -> Any:
    provider = OpenAIProvider(base_url=f"{address}/v1", api_key=KEY)
    return KINDS[kind](name, provider=provider, settings={"temperature": 0})


def _weather_agent(model: Any, asked: list[str]) -> Agent:
    agent = Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Get the weather of a city"""
        asked.append(city)
        if city == "Atlantis":
            raise ModelRetry("There is no such city; use Paris.")
        return f"{city}: 21 degrees"

    return agent


@pytest.mark.parametrize("kind", KINDS)
async def test_an_agent_calls_tools_retries_and_answers(scripted: ScriptedModel, kind: str) -> None:
    scripted.play(
        (["Paris: 21 degrees"], "It is 21 degrees in Paris."),
        (["There is no such city"], call("get_weather", city="Paris")),
        (["How warm"], "I ask.\n" + call("get_weather", city="Atlantis")),
    )
    asked: list[str] = []
    agent = _weather_agent(_model(kind, scripted.address, SCRIPTED), asked)
    result = await agent.run("How warm is it?")
    assert result.output == "It is 21 degrees in Paris."
    assert asked == ["Atlantis", "Paris"]
    assert result.usage.requests == 3 and result.usage.output_tokens > 0
    first, second, third = scripted.prompts
    assert '"name": "get_weather"' in first and "I ask." in second and "Atlantis" in third


@pytest.mark.parametrize("kind", KINDS)
async def test_a_streamed_run_goes_on_in_a_second_turn(scripted: ScriptedModel, kind: str) -> None:
    scripted.play(
        (["It is 21 degrees", "Thanks"], "You are welcome."),
        (["Paris: 21 degrees"], "It is 21 degrees in Paris."),
        (["How warm"], "I ask.\n" + call("get_weather", city="Paris")),
    )
    asked: list[str] = []
    agent = _weather_agent(_model(kind, scripted.address, SCRIPTED), asked)
    pieces: list[str] = []
    async with agent.run_stream_events("How warm is it?") as events:
        async for event in events:
            if isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
                pieces.append(event.delta.content_delta)
            if isinstance(event, AgentRunResultEvent):
                result = event.result
    assert len(pieces) > 2 and result.output == "It is 21 degrees in Paris."
    assert asked == ["Paris"]
    more = await agent.run("Thanks", message_history=result.all_messages())
    assert more.output == "You are welcome."


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", [NativeOutput(Person), ToolOutput(Person)])
async def test_output_is_structured(server: str, kind: str, output: Any) -> None:
    agent = Agent(_model(kind, server, MODEL), output_type=output)
    assert (await agent.run(FACTS)).output == ANNA
    async with agent.run_stream(FACTS) as stream:
        assert await stream.get_output() == ANNA


@pytest.mark.parametrize("kind", KINDS)
async def test_tools_and_then_structure(scripted: ScriptedModel, kind: str) -> None:
    scripted.play(
        (["Paris: 21 degrees"], '{"city": "Paris", "degrees": 21}'),
        (["How warm"], call("get_weather", city="Paris")),
    )
    agent = _weather_agent(_model(kind, scripted.address, SCRIPTED), [])
    result = await agent.run("How warm is it?", output_type=NativeOutput(Weather))
    assert result.output == Weather(city="Paris", degrees=21)
