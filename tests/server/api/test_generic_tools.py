"""--tool-call-parser generic: tools for models whose chat template knows nothing of them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from quire.server.templates.generic_tools import with_tools_as_text

from ..conftest import make_app
from ..fakes import FakeEngineClient, byte_tokenizer, prompt_text, say
from ..openai_http import CHAT, HI, stream
from .test_forced_calls import accepts
from .test_tool_calls import ARGUMENTS, CALL, TOOL, chat

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)
"""A template that refuses system messages, and two messages of the user in a row."""
HISTORY = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {"id": "1", "function": {"name": "weather", "arguments": ARGUMENTS}},
            {"id": "2", "function": {"name": "other", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "rain <|im_end|>"},
    {"role": "tool", "tool_call_id": "2", "content": "ok"},
    {"role": "user", "content": "And?"},
]


def client_of(engine: FakeEngineClient, template: str) -> tuple[httpx.AsyncClient, Any]:
    tokenizer = byte_tokenizer(template)
    engine.max_model_len = engine.num_blocks = 4096
    transport = httpx.ASGITransport(app=make_app(engine, tokenizer, tool_call_parser="generic"))
    return httpx.AsyncClient(transport=transport, base_url="http://quire"), tokenizer


@pytest.mark.parametrize("template", [PLAIN, ALTERNATING], ids=["system", "no system"])
async def test_the_conversation_becomes_text(engine: FakeEngineClient, template: str) -> None:
    client, tokenizer = client_of(engine, template)
    async with client:
        await chat(client, tools=[TOOL], messages=HISTORY)
        text = prompt_text(engine, tokenizer)
        # 1. The tools are told at the beginning.
        first = "<system>" if template == PLAIN else "<user>"
        introduction, _, rest = text.partition("Let me see.")
        assert introduction.startswith(first) and json.dumps(TOOL["function"]) in introduction
        # 2. Calls are as the model would write them; results are one message of the user's.
        call = json.dumps(
            {"name": "weather", "arguments": json.loads(ARGUMENTS)}, ensure_ascii=False
        )
        assert rest.startswith(f"\n<tool_call>\n{call}\n</tool_call>\n<tool_call>\n")
        assert '{"name": "other", "arguments": {}}' in rest
        [results] = rest.split("<user>")[1:]
        assert results.startswith("Result of weather:\n<tool_response>\nrain <|im_end|>\n")
        assert "Result of other:\n<tool_response>\nok\n" in results
        assert results.endswith("\n\nAnd?\n")
        # 3. Control tokens of a result are text.
        assert tokenizer.special_ids["<|im_end|>"] not in engine.requests[-1].prompt_token_ids
        # 4. Earlier calls are text even if there are no tools now.
        await chat(client, messages=HISTORY)
        text = prompt_text(engine, tokenizer)
        assert text.startswith("<user>hi") and call in text
        counted = await client.post("/tokenize", json={"messages": HISTORY, "tools": [TOOL]})
        assert counted.json()["count"] > len(text)


async def test_calls_are_read_whole_and_streamed(engine: FakeEngineClient) -> None:
    client, _ = client_of(engine, PLAIN)
    engine.scripts = say("Let me see.\n" + CALL)
    async with client:
        choice = await chat(client, tools=[TOOL])
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Let me see."
        [call] = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}
        deltas = [
            chunk["choices"][0]["delta"] for chunk in await stream(client, CHAT, **HI, tools=[TOOL])
        ]
        parts = [part["function"] for delta in deltas for part in delta.get("tool_calls", ())]
        assert "".join(part["arguments"] for part in parts) == ARGUMENTS


async def test_calls_can_be_forced(engine: FakeEngineClient) -> None:
    client, tokenizer = client_of(engine, PLAIN)
    async with client:
        await chat(client, tools=[TOOL], tool_choice="required")
        grammar = engine.requests[-1].grammar
        assert grammar is not None
        assert accepts(tokenizer, grammar, CALL)
        assert not accepts(tokenizer, grammar, "No.")


async def test_wrong_arguments_in_the_history_are_shown_as_they_are(
    engine: FakeEngineClient,
) -> None:
    client, tokenizer = client_of(engine, PLAIN)
    call = {"id": "1", "function": {"name": "weather", "arguments": "[1]"}}
    async with client:
        messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
        response = await client.post("/v1/chat/completions", json={"messages": messages})
        assert response.status_code == 200, response.text
        [request] = engine.requests
        prompt = tokenizer.backend.decode(list(request.prompt_token_ids))
        assert '{"raw_arguments": "[1]"}' in prompt


def test_the_system_message_of_the_client_is_kept() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    user = {"role": "user", "content": "hi"}
    for role in ("system", "developer"):
        own = {"role": role, "content": "Be kind."}
        first, second = with_tools_as_text([own, user], [tool], has_system=True)
        assert first["role"] == role and first["content"].startswith("Be kind.\n\nYou can call")
        assert second == user
    [only] = with_tools_as_text([user], [tool], has_system=False)
    assert only["role"] == "user" and only["content"].endswith("\n\nhi")
    assert with_tools_as_text([user], [], has_system=True) == [user]
    called = {"role": "assistant", "content": None}
    first, second = with_tools_as_text([called], [tool], has_system=False)
    assert (first["role"], second) == ("user", called)
