"""Every format of calls through the whole server: tokens of one byte, whole answers and streams."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quire.server.parsing.formats.tool_formats import TOOL_FORMATS

from ..conftest import app_client, make_app
from ..fakes import FakeEngineClient, Script, byte_tokenizer
from ..openai_http import CHAT, HI, stream
from ..parsing.pieces import TOOLS
from ..parsing.samples import json_formats, parameter_formats, python_formats
from ..parsing.samples.sample import NESTED, ODD, FormatSamples
from .test_tool_calls import chat

SAMPLES = (*json_formats.SAMPLES, *parameter_formats.SAMPLES, *python_formats.SAMPLES)
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("get_weather", {"city": "Zürich 🎉", "hourly": True}),
    ("note", {**NESTED, "text": ODD}),
    ("f", {}),
]
FIELDS = {
    "tools": [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in TOOLS.items()
    ]
}


def joined_stream(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the deltas of a stream together as a client does."""
    texts = {"content": "", "reasoning": ""}
    calls: list[dict[str, str]] = []
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        for name in texts:
            texts[name] += delta.get(name) or ""
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                assert part["index"] == len(calls)
                calls.append({"name": part["function"]["name"], "arguments": ""})
            calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return {**texts, "calls": calls}


@pytest.mark.parametrize(
    ("special", "closed"), [(True, True), (False, False)], ids=["control tokens", "never closed"]
)
@pytest.mark.parametrize("samples", SAMPLES, ids=lambda samples: samples.format)
async def test_streams_and_whole_answers_have_the_same_calls(
    engine: FakeEngineClient, samples: FormatSamples, special: bool, closed: bool
) -> None:
    parser = TOOL_FORMATS[samples.format].parser
    tokenizer = byte_tokenizer(special=parser.control_tokens if special else ())
    engine.vocab_size = tokenizer.vocab_size
    engine.max_model_len = engine.num_blocks = 8192
    text = "<think>Hm, ü.\n" + ("</think>\nLet me see. " if closed else "")
    text += samples.frame([samples.call(*call) for call in CALLS])
    tokens = tokenizer.backend.encode(text).ids
    engine.scripts = lambda request, choice: Script(tokens)
    app = make_app(engine, tokenizer, tool_call_parser=samples.format, reasoning_parser="qwen3")
    async with app_client(app) as client:
        choice = await chat(client, **FIELDS)
        chunks = await stream(client, CHAT, **HI, **FIELDS)
    message = choice["message"]
    calls = [call["function"] for call in message["tool_calls"]]
    assert message["reasoning"] == "Hm, ü."
    assert message["content"] == ("Let me see." if closed else None)
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == CALLS
    assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert joined_stream(chunks) == {
        "reasoning": message["reasoning"],
        "content": message["content"] or "",
        "calls": calls,
    }
