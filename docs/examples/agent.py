"""A model that calls a function and reads its result, until it answers."""

import json
import os
from typing import Any

from openai import OpenAI


def get_weather(city: str) -> dict[str, str]:
    """Return the weather of a city. A real program would ask a service."""
    return {"weather": "sunny"}


FUNCTIONS = {"get_weather": get_weather}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = next(iter(client.models.list())).id
messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
for _ in range(5):  # a model that never answers must not run forever
    message = (
        client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0)
        .choices[0]
        .message
    )
    messages.append(message)
    if not message.tool_calls:
        print(message.content)
        break
    for call in message.tool_calls:
        assert call.type == "function"
        print(f"{call.function.name}({call.function.arguments})")
        result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
        content = json.dumps(result)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
