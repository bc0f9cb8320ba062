"""Instructor: answers as pydantic models by JSON schema and by tools, asked again, streamed."""

from __future__ import annotations

from typing import Any

import instructor
import openai
import pytest
from pydantic import BaseModel, field_validator

from .conftest import KEY, MODEL
from .scripted import SCRIPTED, ScriptedModel, call

FACTS = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7."
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": FACTS}], "temperature": 0}


class Person(BaseModel):
    """A person"""

    name: str
    age: int


class Adult(Person):
    """An adult"""

    @field_validator("age")
    @classmethod
    def is_of_age(cls, age: int) -> int:
        if age < 18:
            raise ValueError("An adult is 18 or older.")
        return age


ANNA = {"name": "Anna", "age": 7}


def _client(address: str, mode: instructor.Mode) -> Any:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    return instructor.from_openai(client, mode=mode)


@pytest.mark.parametrize(
    "mode",
    [instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS, instructor.Mode.RESPONSES_TOOLS],
    ids=str,
)
def test_answers_are_models(server: str, mode: instructor.Mode) -> None:
    client = _client(server, mode)
    person, whole = client.create_with_completion(model=MODEL, response_model=Person, **ASK)
    assert (person.model_dump(), whole.model) == (ANNA, MODEL)


async def test_partial_models_are_streamed(server: str) -> None:
    client = _client(server, instructor.Mode.JSON_SCHEMA)
    partial = list(client.create_partial(model=MODEL, response_model=Person, **ASK))
    assert len(partial) > 3 and partial[-1].model_dump() == ANNA
    async_client = openai.AsyncOpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0)
    patched: Any = instructor.from_openai(async_client, mode=instructor.Mode.TOOLS)
    person = await patched.create(model=MODEL, response_model=Person, **ASK)
    assert person.model_dump() == ANNA


def test_a_wrong_answer_is_asked_for_again(scripted: ScriptedModel) -> None:
    scripted.play(
        (["An adult is 18 or older."], call("Adult", name="Bo", age=20)),
        (["Who is it?"], call("Adult", name="Bo", age=2)),
    )
    client = _client(scripted.address, instructor.Mode.TOOLS)
    messages = [{"role": "user", "content": "Who is it?"}]
    adult = client.create(model=SCRIPTED, response_model=Adult, messages=messages, max_retries=2)
    assert adult.model_dump() == {"name": "Bo", "age": 20} and len(scripted.prompts) == 2


def test_models_of_a_list_are_streamed(scripted: ScriptedModel) -> None:
    people = [{"name": "Anna", "age": 7}, {"name": "Bo", "age": 20}]
    scripted.play((["Who are they?"], call("IterablePerson", tasks=people)))
    client = _client(scripted.address, instructor.Mode.TOOLS)
    messages = [{"role": "user", "content": "Who are they?"}]
    found = list(client.create_iterable(model=SCRIPTED, response_model=Person, messages=messages))
    assert [person.model_dump() for person in found] == people
