"""LiteLLM's proxy in front of quire, asked by the `openai` package as by the users of a gateway."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from .conftest import KEY, MODEL, START_TIMEOUT, command, free_port
from .scripted import SCRIPTED, ScriptedModel, call

QUESTION: list[Any] = [{"role": "user", "content": "What is 12 + 30?"}]
ANSWER = "12 + 30 = 42"
FACTS = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7."
GATEWAY_KEY = "sk-gateway"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": PERSON, "strict": True},
}
TOOL: Any = {
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


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health/liveliness").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail(f"the proxy is not ready:\n{log.read_text(encoding='utf-8')}")


@pytest.fixture(scope="module")
def proxy(
    server: str, _scripted_model: ScriptedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Yield the address of a proxy that knows the demo model and the scripted one."""
    folder = tmp_path_factory.mktemp("proxy")
    targets = {
        "demo": (f"hosted_vllm/{MODEL}", server),
        "demo-openai": (f"openai/{MODEL}", server),
        "agent": (f"hosted_vllm/{SCRIPTED}", _scripted_model.address),
    }
    models = [
        {
            "model_name": name,
            "litellm_params": {"model": model, "api_base": f"{address}/v1", "api_key": KEY},
        }
        for name, (model, address) in targets.items()
    ]
    config = {"model_list": models, "general_settings": {"master_key": GATEWAY_KEY}}
    path, log = folder / "config.json", folder / "log"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is a subset of YAML
    port = free_port()
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HOME": str(folder)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [command("litellm"), "--config", str(path), "--host", "127.0.0.1"]
            + ["--port", str(port), "--telemetry", "False"],
            cwd=folder,
            env=os.environ | environment,
            stdout=output,
            stderr=output,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()


@pytest.fixture
def client(proxy: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{proxy}/v1", api_key=GATEWAY_KEY, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model", ["demo", "demo-openai"])
def test_chats_whole_streamed_and_structured(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "temperature": 0}
    whole = client.chat.completions.create(messages=QUESTION, **fields)
    assert whole.choices[0].message.content == ANSWER
    chunks = list(
        client.chat.completions.create(
            messages=QUESTION, stream=True, stream_options={"include_usage": True}, **fields
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ANSWER and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    facts: list[Any] = [{"role": "user", "content": FACTS}]
    found = client.chat.completions.create(messages=facts, response_format=FORMAT, **fields)
    assert json.loads(found.choices[0].message.content or "") == {"name": "Anna", "age": 7}


def test_a_loop_with_a_tool(client: openai.OpenAI, scripted: ScriptedModel) -> None:
    scripted.play(
        (["Paris: 21 degrees"], "It is 21 degrees in Paris."),
        (["How warm"], "I ask.\n" + call("get_weather", city="Paris")),
    )
    turns: list[Any] = [{"role": "user", "content": "How warm is it?"}]
    asked = client.chat.completions.create(model="agent", messages=turns, tools=[TOOL])
    message = asked.choices[0].message
    (called,) = message.tool_calls or ()
    assert called.type == "function"
    assert json.loads(called.function.arguments) == {"city": "Paris"}
    with client.chat.completions.stream(model="agent", messages=turns, tools=[TOOL]) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert streamed.function.arguments == called.function.arguments
    result = {"role": "tool", "tool_call_id": called.id, "content": "Paris: 21 degrees"}
    turns += [message.to_dict(), result]
    last = client.chat.completions.create(model="agent", messages=turns, tools=[TOOL])
    assert last.choices[0].message.content == "It is 21 degrees in Paris."


@pytest.mark.parametrize("model", ["demo", "demo-openai"])
def test_responses(client: openai.OpenAI, model: str) -> None:
    whole = client.responses.create(model=model, input="What is 12 + 30?", temperature=0)
    assert whole.output_text == ANSWER
    with client.responses.stream(model=model, input="What is 12 + 30?", temperature=0) as stream:
        assert stream.get_final_response().output_text == ANSWER


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(model="demo", messages=QUESTION, top_p=2)
