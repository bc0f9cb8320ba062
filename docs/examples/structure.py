"""An answer that obeys a schema: the class says which fields there are."""

import os

from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
answer = client.chat.completions.parse(
    model=next(iter(client.models.list())).id,
    messages=[
        {
            "role": "user",
            "content": "Fill in this JSON schema: {name: string, age: integer}\n"
            "The name is Anna, age is 7.",
        }
    ],
    response_format=Person,
    temperature=0,
)
person = answer.choices[0].message.parsed
assert person is not None
print(f"{person.name} is {person.age}")
