"""A tool of LangChain, called by the model."""

import os

from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import SecretStr


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city"""
    return '{"weather": "sunny"}'


model = ChatOpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=SecretStr(os.environ.get("OPENAI_API_KEY", "none")),
    model=os.environ.get("MODEL", "quire-demo"),
    temperature=0,
)
messages: list[BaseMessage] = [HumanMessage("What is the weather in Paris?")]
answer = model.bind_tools([get_weather]).invoke(messages)
messages.append(answer)
for call in answer.tool_calls:
    print(f"{call['name']}({call['args']})")
    messages.append(get_weather.invoke(call))
print(model.bind_tools([get_weather]).invoke(messages).text)
