"""LlamaIndex's OpenAILike: chats, completions, streams, structure, and agents that call tools."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentStream, FunctionAgent, ReActAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

from .conftest import KEY, MODEL
from .scripted import SCRIPTED, ScriptedModel, call

ANSWER = "12 + 30 = 42"
FACTS = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7."


class Person(BaseModel):
    """A person"""

    name: str
    age: int


def get_weather(city: str) -> str:
    """Get the weather of a city"""
    return f"{city}: 21 degrees"


def _llm(address: str, model: str, **fields: Any) -> OpenAILike:
    values = {"is_chat_model": True, "is_function_calling_model": True, "max_retries": 0}
    return OpenAILike(
        model=model,
        api_base=f"{address}/v1",
        api_key=KEY,
        temperature=0,
        context_window=4096,
        **values | fields,
    )


async def test_chats_whole_and_streamed(server: str) -> None:
    llm = _llm(server, MODEL)
    question = [ChatMessage(role="user", content="What is 12 + 30?")]
    assert llm.chat(question).message.content == ANSWER
    assert "".join(piece.delta or "" for piece in llm.stream_chat(question)) == ANSWER
    stream = await llm.astream_chat(question)
    assert "".join([piece.delta or "" async for piece in stream]) == ANSWER


def test_completions(server: str) -> None:
    llm = _llm(server, MODEL, is_chat_model=False, max_tokens=8)
    text = llm.complete("Once upon").text
    assert "".join(piece.delta or "" for piece in llm.stream_complete("Once upon")) == text != ""


@pytest.mark.parametrize("structured", [True, False], ids=["json_schema", "tool"])
def test_structured_predict(server: str, structured: bool) -> None:
    llm = _llm(server, MODEL, should_use_structured_outputs=structured)
    template = PromptTemplate("{facts}")
    found = llm.structured_predict(Person, template, facts=FACTS)
    assert found == Person(name="Anna", age=7)


async def test_a_function_agent_calls_a_tool_and_streams(scripted: ScriptedModel) -> None:
    scripted.play(
        (["Paris: 21 degrees"], "It is 21 degrees in Paris."),
        (["How warm"], "I ask.\n" + call("get_weather", city="Paris")),
    )
    agent = FunctionAgent(tools=[get_weather], llm=_llm(scripted.address, SCRIPTED))
    handler = agent.run(user_msg="How warm is it?")
    pieces = [event.delta async for event in handler.stream_events() if type(event) is AgentStream]
    answer = await handler
    assert str(answer) == "It is 21 degrees in Paris."
    assert "".join(pieces).endswith("It is 21 degrees in Paris.") and len(pieces) > 3
    assert [called.tool_kwargs for called in answer.tool_calls] == [{"city": "Paris"}]


async def test_a_react_agent_reads_its_observations(scripted: ScriptedModel) -> None:
    scripted.play(
        (["Paris: 21 degrees"], "Thought: I know it.\nAnswer: It is 21 degrees."),
        (
            ["How warm"],
            'Thought: I ask.\nAction: get_weather\nAction Input: {"city": "Paris"}',
        ),
    )
    agent = ReActAgent(tools=[get_weather], llm=_llm(scripted.address, SCRIPTED))
    assert str(await agent.run(user_msg="How warm is it?")) == "It is 21 degrees."
