"""LangGraph: a graph of its own that calls tools, streamed by token, resumed from a checkpoint."""

from __future__ import annotations

import operator
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessageChunk, AnyMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, interrupt
from pydantic import BaseModel, SecretStr

from .conftest import KEY
from .scripted import SCRIPTED, ScriptedModel, call

ANSWER = "It is 21 degrees in Paris and 4 in Oslo."


class State(TypedDict):
    """A conversation."""

    messages: Annotated[list[AnyMessage], operator.add]


class Weather(BaseModel):
    """The weather of a city"""

    city: str
    degrees: int


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city"""
    return f"{city}: {21 if city == 'Paris' else 4} degrees"


@tool
def ask_a_person(question: str) -> str:
    """Ask a person"""
    return str(interrupt(question))


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def model(scripted: ScriptedModel, request: pytest.FixtureRequest) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{scripted.address}/v1",
        api_key=SecretStr(KEY),
        model=SCRIPTED,
        max_retries=0,
        use_responses_api=request.param,
    )


def _agent(model: ChatOpenAI) -> Any:
    """Return a graph in which the model and its tools take turns."""
    tools = [get_weather, ask_a_person]
    with_tools = model.bind_tools(tools)

    def think(state: State) -> dict[str, Any]:
        return {"messages": [with_tools.invoke(state["messages"])]}

    graph = StateGraph(State)
    graph.add_node("think", think)
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "think")
    graph.add_conditional_edges("think", tools_condition, {"tools": "tools", END: END})
    graph.add_edge("tools", "think")
    return graph.compile(checkpointer=InMemorySaver())


def _ask(text: str) -> dict[str, Any]:
    return {"messages": [HumanMessage(text)]}


WEATHER = (
    (["Paris: 21 degrees", "Oslo: 4 degrees", "Thanks"], "You are welcome."),
    (["Paris: 21 degrees", "Oslo: 4 degrees"], ANSWER),
    (["How warm"], call("get_weather", city="Paris") + call("get_weather", city="Oslo")),
)


def test_two_calls_at_once_and_a_second_turn(model: ChatOpenAI, scripted: ScriptedModel) -> None:
    scripted.play(*WEATHER)
    agent, thread = _agent(model), {"configurable": {"thread_id": "a"}}
    messages = agent.invoke(_ask("How warm is it?"), thread)["messages"]
    assert [m.content for m in messages if isinstance(m, ToolMessage)] == [
        "Paris: 21 degrees",
        "Oslo: 4 degrees",
    ]
    assert messages[-1].text == ANSWER
    assert agent.invoke(_ask("Thanks"), thread)["messages"][-1].text == "You are welcome."


async def test_tokens_are_streamed(model: ChatOpenAI, scripted: ScriptedModel) -> None:
    scripted.play(*WEATHER)
    thread = {"configurable": {"thread_id": "b"}}
    agent = _agent(model)
    texts: list[str] = []
    async for chunk, where in agent.astream(
        _ask("How warm is it?"), thread, stream_mode="messages"
    ):
        if isinstance(chunk, AIMessageChunk) and chunk.text:
            assert where["langgraph_node"] == "think"
            texts.append(chunk.text)
    assert len(texts) > 3 and "".join(texts) == ANSWER


def test_a_run_is_interrupted_and_resumed(model: ChatOpenAI, scripted: ScriptedModel) -> None:
    scripted.play(
        (["Yes, go."], "Then I go."),
        (["May you go?"], call("ask_a_person", question="May I go?")),
    )
    agent, thread = _agent(model), {"configurable": {"thread_id": "c"}}
    (stopped,) = agent.invoke(_ask("May you go?"), thread)["__interrupt__"]
    assert stopped.value == "May I go?"
    messages = agent.invoke(Command(resume="Yes, go."), thread)["messages"]
    assert messages[-1].text == "Then I go."


def test_structured_output_with_its_message(model: ChatOpenAI, scripted: ScriptedModel) -> None:
    scripted.play((["Oslo"], '{"city": "Oslo", "degrees": 4}'))
    structured = model.with_structured_output(Weather, method="json_schema", include_raw=True)
    answer = structured.invoke("Oslo")
    assert isinstance(answer, dict)
    assert answer["parsed"] == Weather(city="Oslo", degrees=4) and answer["raw"].text
