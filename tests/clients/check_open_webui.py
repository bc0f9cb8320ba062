"""Open WebUI in front of a server with a scripted model, asked as its page asks it.

A chat of the page runs in Open WebUI's server: it streams from quire, runs tools, goes on with
their results, and stores the messages. Then it asks the model for a title and for tags.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .agents import Model, serving
from .conftest import KEY, START_TIMEOUT, command, free_port
from .scripted import call

TOOL = '''
class Tools:
    def get_weather(self, city: str) -> str:
        """Get the weather of a city.

        :param city: The city.
        """
        return f"{city}: 21 degrees"
'''


def _answer(prompt: str) -> str:
    if "### Task:\nGenerate a concise" in prompt:
        return '{"title": "Weather of Paris"}'
    if "### Task:\nGenerate 1-3 broad tags" in prompt:
        return '{"tags": ["weather"]}'
    if "Thanks" in prompt:
        return "You are welcome."
    if "Paris: 21 degrees" in prompt:
        return "<think>It is warm.</think>It is 21 degrees in Paris."
    return "<think>I need it.</think>I ask.\n" + call("get_weather", city="Paris")


def _until(found: Callable[[], Any], seconds: float) -> Any:
    """Call `found` until it returns something true or time is up; return what it returned last."""
    deadline = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return value


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(_answer)


@pytest.fixture(scope="module")
def page(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a client that is signed in to an Open WebUI whose only server is quire."""
    folder = tmp_path_factory.mktemp("webui")
    port, log = free_port(), folder / "log"
    with serving(model, "scripted") as address, log.open("wb") as output:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "DATA_DIR": str(folder / "data"),
            "WEBUI_AUTH": "False",
            "WEBUI_SECRET_KEY": "secret",
            "OPENAI_API_BASE_URL": f"{address}/v1",
            "OPENAI_API_KEY": KEY,
            "ENABLE_OLLAMA_API": "False",
            # Without these it would ask the internet for models, versions and statistics.
            "RAG_EMBEDDING_ENGINE": "openai",
            "OFFLINE_MODE": "True",
            "HF_HUB_OFFLINE": "1",
            "ANONYMIZED_TELEMETRY": "False",
            "DO_NOT_TRACK": "true",
            "SCARF_NO_ANALYTICS": "true",
            "ENABLE_VERSION_UPDATE_CHECK": "False",
        }
        process = subprocess.Popen(
            [command("open-webui"), "serve", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                _wait(process, client, log)
                signed = client.post("/api/v1/auths/signin", json={"email": "", "password": ""})
                client.headers["authorization"] = f"Bearer {signed.json()['token']}"
                yield client
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            finally:
                process.kill()


def _wait(process: subprocess.Popen[bytes], client: httpx.Client, log: Path) -> None:
    def is_ready() -> bool:
        if process.poll() is not None:
            return True
        try:
            return client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    if not _until(is_ready, START_TIMEOUT) or process.poll() is not None:
        pytest.fail(f"Open WebUI is not ready:\n{log.read_text(encoding='utf-8')}")


def _ask(page: httpx.Client, text: str, chat: str | None, parent: str | None) -> dict[str, Any]:
    """Send a message of a chat as the page does; return the stored chat when it is answered."""
    ids = str(uuid.uuid4()), str(uuid.uuid4())
    message = {"id": ids[0], "role": "user", "content": text, "parentId": parent}
    body: dict[str, Any] = {
        "model": "scripted",
        "stream": True,
        "messages": [{"role": "user", "content": text}],
        "user_message": message,
        "parent_id": parent,
        "id": ids[1],
        "session_id": "a-page",
        "tool_ids": ["weather"],
        "background_tasks": {"title_generation": True, "tags_generation": True},
    }
    started = page.post("/api/chat/completions", json=body | ({"chat_id": chat} if chat else {}))
    assert started.status_code == 200, started.text
    chat = started.json()["chat_id"]

    def answered() -> Any:
        stored = page.get(f"/api/v1/chats/{chat}").json()
        answer = stored["chat"]["history"]["messages"].get(ids[1], {})
        return stored if answer.get("done") else None

    stored = _until(answered, 60)
    assert stored, page.get(f"/api/v1/chats/{chat}").json()
    return {"chat": chat, "id": ids[1], **stored["chat"]["history"]["messages"][ids[1]]}


def test_models_are_listed_and_a_program_asks(page: httpx.Client) -> None:
    assert [entry["id"] for entry in page.get("/api/models").json()["data"]] == ["scripted"]
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Thanks"}]}
    whole = page.post("/api/chat/completions", json=body)
    assert whole.json()["choices"][0]["message"]["content"] == "You are welcome."
    streamed = page.post("/api/chat/completions", json=body | {"stream": True})
    assert streamed.text.count("data: {") > 3 and streamed.text.rstrip().endswith("[DONE]")


def test_a_chat_with_a_tool_a_title_and_a_second_turn(page: httpx.Client, model: Model) -> None:
    made = page.post(
        "/api/v1/tools/create",
        json={"id": "weather", "name": "weather", "content": TOOL, "meta": {"description": "w"}},
    )
    assert made.status_code == 200, made.text
    first = _ask(page, "How warm is it in Paris?", None, None)
    assert "It is 21 degrees in Paris." in first["content"]
    assert "I need it." in json.dumps(first)

    def title_is_made() -> bool:
        title = page.get(f"/api/v1/chats/{first['chat']}").json()["title"]
        return bool(title == "Weather of Paris")

    assert _until(title_is_made, 30)
    second = _ask(page, "Thanks", first["chat"], first["id"])
    assert second["content"] == "You are welcome."
    end = "Thanks<|im_end|>\n<|im_start|>assistant\n"
    (last,) = [
        prompt
        for prompt in model.prompts
        if "user\nHow warm is it in Paris?" in prompt and prompt.endswith(end)
    ]
    turns = last.split("How warm is it in Paris?")[1]
    for said in ("I ask.<tool_call>", "Paris: 21 degrees", "It is 21 degrees in Paris."):
        assert said in turns
