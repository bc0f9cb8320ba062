"""Fields that have no effect: accepted and named in a header, and refused by a strict server."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from quire.server.text.tokenizer import Tokenizer

from ..conftest import MakeClient, app_client, make_app
from ..fakes import CHAT_TEMPLATE, FakeEngineClient, byte_tokenizer, prompt_text
from ..openai_http import CHAT, HI, assert_error
from .test_tool_calls import TOOL

HEADER = "x-quire-ignored-params"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
WITHOUT_TOOLS: list[dict[str, Any]] = [
    {"tool_choice": "auto"},
    {"tool_choice": "none"},
    {"parallel_tool_calls": True},
    {"parallel_tool_calls": False},
    {"function_call": "none"},
]
WITHOUT_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"enable_thinking": True}, "enable_thinking"),
    ({"thinking_token_budget": 3}, "thinking_token_budget"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs.?"),
]
NOTHING: list[dict[str, Any]] = [
    {"user": ""}, {"modalities": ["text"]}, {"service_tier": "auto"}, {"store": False},
    {"verbosity": "medium"}, {"metadata": {}}, {"prediction": None}, {"tools": []},
    {"reasoning_effort": "none"}, {"enable_thinking": False}, {"chat_template_kwargs": {}},
    {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False}, {"novelty": None},
]  # fmt: skip


def client_of(engine: FakeEngineClient, tokenizer: Tokenizer, **settings: Any) -> httpx.AsyncClient:
    return app_client(make_app(engine, tokenizer, **settings))


@pytest.mark.parametrize(
    ("fields", "named"),
    [*((fields, next(iter(fields))) for fields in WITHOUT_TOOLS), *WITHOUT_SETTINGS],
    ids=str,
)
async def test_what_has_no_effect_is_named(
    engine: FakeEngineClient, fields: dict[str, Any], named: str
) -> None:
    """The template reads no settings, and the model does not reason."""
    tokenizer = byte_tokenizer(PLAIN)
    async with client_of(engine, tokenizer) as client:
        for stream in (False, True):
            response = await client.post(CHAT, json={**HI, **fields, "stream": stream})
            assert response.status_code == 200, response.text
            assert response.headers[HEADER] == named
        assert prompt_text(engine, tokenizer) == "user: hi\n"
    async with client_of(engine, tokenizer, strict=True) as client:
        response = await client.post(CHAT, json={**HI, **fields})
        assert_error(response, 400, "invalid_value", named)
        assert "no effect" in response.json()["error"]["message"]


@pytest.mark.parametrize("fields", NOTHING, ids=str)
async def test_what_asks_for_nothing_is_not_named(
    engine: FakeEngineClient, fields: dict[str, Any]
) -> None:
    template = PLAIN + "{# <tool_call> #}{{ tools }}"
    async with client_of(engine, byte_tokenizer(template), strict=True) as client:
        response = await client.post(CHAT, json={**HI, **fields})
        assert response.status_code == 200, response.text
        assert HEADER not in response.headers


async def test_all_fields_without_effect_are_named_at_once(
    engine: FakeEngineClient, make_client: MakeClient
) -> None:
    fields = {
        "service_tier": "flex", "store": True, "mood": 1, "tool_choice": "auto",
        "chat_template_kwargs": {"mood": 1, "enable_thinking": False},
    }  # fmt: skip
    response = await make_client().post(CHAT, json={**HI, **fields})
    named = response.headers[HEADER].split(", ")
    expected = {"service_tier", "store", "mood", "tool_choice", "chat_template_kwargs.mood"}
    assert set(named) == expected and len(named) == 5
    response = await make_client(strict=True).post(CHAT, json={**HI, "a": 1, "b": 2})
    message = response.json()["error"]["message"]
    assert message == "unknown fields a, b"


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"enable_thinking": False}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "high", "enable_thinking": False}, False),
        ({"reasoning_effort": "none", "enable_thinking": True}, True),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, False),
    ],
    ids=str,
)
async def test_reasoning_is_turned_off_by_any_of_its_names(
    engine: FakeEngineClient, tokenizer: Tokenizer, fields: dict[str, Any], thinks: bool
) -> None:
    async with client_of(engine, tokenizer, strict=True) as client:
        for body in (fields, {**fields, "stream": True}):
            response = await client.post(CHAT, json={**HI, **body})
            assert response.status_code == 200, response.text
            assert HEADER not in response.headers
            assert prompt_text(engine, tokenizer).endswith("<think></think>") != thinks
        counted = await client.post("/tokenize", json={**HI, **fields})
        assert counted.json()["tokens"] == list(engine.requests[-1].prompt_token_ids)


async def test_other_endpoints_name_settings_too(engine: FakeEngineClient) -> None:
    async with client_of(engine, byte_tokenizer(PLAIN)) as client:
        kwargs = {"chat_template_kwargs": {"mood": 1}}
        response = await client.post("/tokenize", json={**HI, **kwargs})
        assert response.headers[HEADER] == "chat_template_kwargs.mood"
        fields = {"model": HI["model"], "input": "hi", **kwargs}
        response = await client.post("/v1/responses", json=fields)
        assert response.headers[HEADER] == "chat_template_kwargs.mood"
        fields = {**HI, "max_tokens": 9, **kwargs}
        response = await client.post("/v1/messages", json=fields)
        assert response.headers[HEADER] == "chat_template_kwargs.mood"
        response = await client.post("/v1/messages/count_tokens", json={**HI, **kwargs})
        assert response.headers[HEADER] == "chat_template_kwargs.mood"


async def test_the_sdk_sends_hints(client: httpx.AsyncClient) -> None:
    sdk = openai.AsyncOpenAI(base_url="http://quire/v1", api_key="x", http_client=client)
    raw = await sdk.chat.completions.with_raw_response.create(
        **HI,
        prediction={"type": "content", "content": "Hello"},
        service_tier="priority",
        safety_identifier="u",
        prompt_cache_key="k",
        verbosity="low",
        store=True,
        metadata={"a": "b"},
    )
    assert raw.parse().choices[0].message.content == "Hello, world"
    assert set(raw.headers[HEADER].split(", ")) == {
        *("prediction", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"),
        *("store", "metadata"),
    }


async def test_a_template_without_a_switch_may_still_reason(engine: FakeEngineClient) -> None:
    """Here "none" asks for something that the model cannot do."""
    template = CHAT_TEMPLATE.replace("enable_thinking", "hidden_switch")
    async with client_of(engine, byte_tokenizer(template)) as client:
        response = await client.post(CHAT, json={**HI, "reasoning_effort": "none"})
        assert response.headers[HEADER] == "reasoning_effort"
