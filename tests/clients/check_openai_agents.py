"""OpenAI's Agents SDK: tools, a handoff, structure and streams, by chat and by responses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import agents
import openai
import pytest
from agents import Agent, ModelSettings, Runner, SQLiteSession
from pydantic import BaseModel

from .conftest import KEY, MODEL
from .scripted import SCRIPTED, ScriptedModel, call

FACTS = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7."
KINDS = {
    "chat": agents.OpenAIChatCompletionsModel,
    "responses": agents.OpenAIResponsesModel,
}
agents.set_tracing_disabled(True)


class Person(BaseModel):
    name: str
    age: int


class Weather(BaseModel):
    city: str
    degrees: int


@agents.function_tool
def get_weather(city: str) -> str:
    """Get the weather of a city"""
    return f"{city}: 21 degrees"


@pytest.fixture(params=KINDS)
async def model(scripted: ScriptedModel, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    address = f"{scripted.address}/v1"
    async with openai.AsyncOpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
        yield KINDS[request.param](model=SCRIPTED, openai_client=client)


WEATHER = (
    (["It is 21 degrees in Paris.", "Thanks"], "You are welcome."),
    (["Paris: 21 degrees"], "It is 21 degrees in Paris."),
    (["How warm"], "I ask.\n" + call("get_weather", city="Paris")),
)


async def test_an_agent_calls_a_tool_and_remembers(model: Any, scripted: ScriptedModel) -> None:
    scripted.play(*WEATHER)
    agent = Agent("weather", instructions="Be brief.", model=model, tools=[get_weather])
    session = SQLiteSession("a")
    result = await Runner.run(agent, "How warm is it?", session=session)
    assert result.final_output == "It is 21 degrees in Paris."
    assert result.context_wrapper.usage.requests == 2
    assert result.context_wrapper.usage.output_tokens > 0
    again = await Runner.run(agent, "Thanks", session=session)
    assert again.final_output == "You are welcome."
    assert "Be brief." in scripted.prompts[-1] and "I ask." in scripted.prompts[-1]


async def test_a_streamed_run(model: Any, scripted: ScriptedModel) -> None:
    scripted.play(*WEATHER)
    agent = Agent("weather", model=model, tools=[get_weather])
    result = Runner.run_streamed(agent, "How warm is it?")
    pieces, items = [], []
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            pieces.append(event.data.delta)
        if event.type == "run_item_stream_event":
            items.append(event.name)
    assert "".join(pieces).endswith("It is 21 degrees in Paris.") and len(pieces) > 3
    assert items.index("tool_called") < items.index("tool_output")
    assert result.final_output == "It is 21 degrees in Paris."


async def test_a_handoff(model: Any, scripted: ScriptedModel) -> None:
    scripted.play(
        (["You know cats.", "What do they eat?"], "They eat fish."),
        (["What do they eat?"], call("transfer_to_cats")),
    )
    cats = Agent("cats", instructions="You know cats.", model=model)
    desk = Agent("desk", instructions="You hand over.", model=model, handoffs=[cats])
    result = await Runner.run(desk, "What do they eat?")
    assert (result.last_agent.name, result.final_output) == ("cats", "They eat fish.")


async def test_tools_and_then_structure(model: Any, scripted: ScriptedModel) -> None:
    scripted.play(
        (["Paris: 21 degrees"], '{"city": "Paris", "degrees": 21}'),
        (["How warm"], call("get_weather", city="Paris")),
    )
    agent = Agent("weather", model=model, tools=[get_weather], output_type=Weather)
    result = await Runner.run(agent, "How warm is it?")
    assert result.final_output == Weather(city="Paris", degrees=21)


@pytest.mark.parametrize("kind", KINDS)
async def test_structured_output(server: str, kind: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key=KEY) as client:
        model: Any = KINDS[kind](model=MODEL, openai_client=client)
        settings = ModelSettings(temperature=0)
        agent = Agent("facts", model=model, output_type=Person, model_settings=settings)
        result = await Runner.run(agent, FACTS)
    assert result.final_output == Person(name="Anna", age=7)
