"""LangChain's ChatOpenAI: plain, streamed and structured answers, and tools."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from .conftest import KEY, MODEL
from .examples import output_of

QUESTION = "What is 12 + 30?"
ANSWER = "12 + 30 = 42"
FACTS = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7."


class Person(BaseModel):
    """A person"""

    name: str
    age: int


class get_weather(BaseModel):  # noqa: N801  (the tool's name)
    """Get the weather of a city"""

    city: str


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def model(server: str, request: pytest.FixtureRequest) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server}/v1",
        api_key=SecretStr(KEY),
        model=MODEL,
        temperature=0,
        max_retries=0,
        use_responses_api=request.param,
    )


def test_invoke_and_batch(model: ChatOpenAI) -> None:
    answer = model.invoke(QUESTION)
    assert answer.text == ANSWER
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] > 5
    assert [answer.text for answer in model.batch([QUESTION] * 3)] == [ANSWER] * 3


async def test_stream(model: ChatOpenAI) -> None:
    pieces = list(model.stream(QUESTION))
    assert len(pieces) > 3 and "".join(piece.text for piece in pieces) == ANSWER
    assert "".join([piece.text async for piece in model.astream(QUESTION)]) == ANSWER


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_with_structured_output(model: ChatOpenAI, method: str) -> None:
    structured = model.with_structured_output(Person, method=method)  # type: ignore[arg-type]
    assert structured.invoke(FACTS) == Person(name="Anna", age=7)


def test_bind_tools(model: ChatOpenAI) -> None:
    with_tools = model.bind_tools([get_weather])
    question = HumanMessage("What is the weather in Paris?")
    called = with_tools.invoke([question])
    assert isinstance(called, AIMessage)
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    chunks = list(with_tools.stream([question]))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk  # type: ignore[assignment]
    assert isinstance(whole, AIMessageChunk)
    assert [call["args"] for call in whole.tool_calls] == [{"city": "Paris"}]
    result = ToolMessage('{"weather": "sunny"}', tool_call_id=call["id"])
    assert with_tools.invoke([question, called, result]).text == "The weather in Paris is sunny."


def test_the_example_calls_its_tool(server: str) -> None:
    called, answer = output_of("langchain_agent.py", server).splitlines()
    assert called == "get_weather({'city': 'Paris'})"
    assert answer == "The weather in Paris is sunny."
