"""Chats over HTTP with templates that do not read them as they are."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from ..conftest import app_client, make_app
from ..fakes import FakeEngineClient, byte_tokenizer, prompt_text
from ..openai_http import CHAT, assert_error
from ..text.templates import FAMILIES

SYSTEM = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
CHANGES, IGNORED = "x-quire-prompt-changes", "x-quire-ignored-params"


async def post(engine: FakeEngineClient, family: str, path: str, **fields: Any) -> httpx.Response:
    tokenizer = byte_tokenizer(FAMILIES[family])
    async with app_client(make_app(engine, tokenizer)) as client:
        response = await client.post(path, json={"model": "tiny", **fields})
    if engine.requests:
        response.extensions["prompt"] = prompt_text(engine, tokenizer)
    return response


@pytest.mark.parametrize("stream", [False, True])
async def test_a_system_message_that_a_template_drops_is_moved_and_named(
    engine: FakeEngineClient, stream: bool
) -> None:
    response = await post(engine, "phi3", CHAT, messages=SYSTEM, stream=stream)
    assert response.status_code == 200
    assert response.headers[CHANGES] == "system-in-user"
    assert response.extensions["prompt"] == "<|user|>\nS\n\nU<|end|>\n<|assistant|>\n"


async def test_it_is_named_by_the_other_endpoints_too(engine: FakeEngineClient) -> None:
    response = await post(engine, "phi3", "/tokenize", messages=SYSTEM)
    assert response.headers[CHANGES] == "system-in-user"
    user = [{"role": "user", "content": "U"}]
    response = await post(engine, "phi3", "/v1/messages", messages=user, system="S", max_tokens=9)
    assert response.headers[CHANGES] == "system-in-user"
    response = await post(engine, "phi3", "/v1/responses", input="U", instructions="S")
    assert response.headers[CHANGES] == "system-in-user"
    response = await post(engine, "chatml", CHAT, messages=SYSTEM)
    assert CHANGES not in response.headers


async def test_parts_reach_a_template_that_reads_parts(engine: FakeEngineClient) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    for content, written in (("one", "one"), (parts, "one / two")):
        response = await post(
            engine, "llava", CHAT, messages=[{"role": "user", "content": content}]
        )
        assert response.extensions["prompt"] == f"USER: {written} ASSISTANT:"


async def test_fields_that_the_template_does_not_read_are_named(engine: FakeEngineClient) -> None:
    messages = [{"role": "user", "content": "U", "name": "Ann"}]
    response = await post(engine, "chatml", CHAT, messages=messages)
    assert response.headers[IGNORED] == "messages[0].name"
    response = await post(engine, "kimi", CHAT, messages=messages)
    assert IGNORED not in response.headers


async def test_messages_that_the_template_would_drop_are_refused(engine: FakeEngineClient) -> None:
    messages = [*SYSTEM, {"role": "tool", "content": "R", "tool_call_id": "1"}]
    response = await post(engine, "phi3", CHAT, messages=messages)
    assert_error(response, 400, "invalid_value", "messages[2].role")


async def test_tokenizer_info_shows_what_the_template_reads(engine: FakeEngineClient) -> None:
    async with app_client(make_app(engine, byte_tokenizer(FAMILIES["gemma2"]))) as client:
        info = (await client.get("/tokenizer_info")).json()
    traits = info["chat_templates"]["default"]
    assert (traits["user"], traits["system"], traits["repeated_user"]) == ("text", "refused", False)
    assert traits["generation_prompt"] == "<start_of_turn>model\n"
