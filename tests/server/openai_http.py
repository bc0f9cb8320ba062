"""Requests to the OpenAI-compatible endpoints, and the checks that tests of several files share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx

from .conftest import MODEL

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT: dict[str, Any] = {"model": MODEL, "prompt": "p"}
HI: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def assert_error(response: httpx.Response, status: int, code: str, param: str | None) -> None:
    """Check the status, the code and the parameter of an error, and that its body is complete."""
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error["message"][:500]
    assert error["message"]
    assert len(error["message"]) < 1000
    assert response.headers["x-request-id"]


async def stream(client: httpx.AsyncClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    """Return the chunks of a stream, which must end with [DONE]."""
    response = await client.post(path, json={"model": MODEL, "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until the condition holds, and fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
