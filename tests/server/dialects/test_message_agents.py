"""Messages as Claude Code sends them: hints, deferred tools, thinking that comes back sealed,
results with images, and max_tokens beyond the context."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest

from quire.server.text.tokenizer import Tokenizer

from ..conftest import MODEL, MakeClient
from ..fakes import REASONING_TEMPLATE, FakeEngineClient, byte_tokenizer, prompt_text, say
from .test_messages import COUNT, PATH, assert_refused, create, stream

SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}}
BASH: dict[str, Any] = {
    "name": "Bash", "description": "Runs a command", "input_schema": SCHEMA,
    "eager_input_streaming": True, "cache_control": {"type": "ephemeral", "ttl": "1h"},
}  # fmt: skip
FETCH: dict[str, Any] = {"name": "WebFetch", "input_schema": SCHEMA, "defer_loading": True}
SEARCH: dict[str, Any] = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
CACHED = {"cache_control": {"type": "ephemeral"}}
CLAUDE: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 32_000,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1.2; cc_entrypoint=cli;"},
        {"type": "text", "text": "You are an agent.", **CACHED},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "list the files"}]},
        {"role": "system", "content": [{"type": "text", "text": "# Environment", **CACHED}]},
    ],
    "tools": [BASH, FETCH, SEARCH],
    "thinking": {"type": "adaptive", "display": "omitted"},
    "output_config": {"effort": "max"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "metadata": {"user_id": json.dumps({"session_id": "1", "device_id": "d" * 64})},
    "stream": True,
}
BETA = {"anthropic-beta": "claude-code-20250219,effort-2025-11-24", "x-app": "cli"}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return byte_tokenizer(REASONING_TEMPLATE)


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(max_model_len=9_000, num_blocks=2048)


@pytest.fixture
def client(make_client: MakeClient) -> httpx.AsyncClient:
    return make_client(reasoning_parser="qwen3", tool_call_parser="hermes")


def call(name: str, arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


async def test_claude_codes_request_is_answered_and_its_hints_are_named(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    response = await client.post(f"{PATH}?beta=true", json=CLAUDE, headers=BETA)
    assert response.status_code == 200, response.text
    assert set(response.headers["x-quire-ignored-params"].split(", ")) == {
        "context_management", "max_tokens", "output_config.effort", "system[0]", "tools[2]",
    }  # fmt: skip
    text = prompt_text(engine, tokenizer)
    assert text.startswith('{"type": "function", "function": {"name": "Bash"')
    assert text.endswith(
        "<|im_start|>system\nYou are an agent.<|im_end|>\n"
        "<|im_start|>user\nlist the files<|im_end|>\n"
        "<|im_start|>system\n# Environment<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "WebFetch" not in text and "web_search" not in text
    prompt = len(engine.requests[-1].prompt_token_ids)
    assert engine.requests[-1].sampling_params.max_tokens == 9_000 - prompt
    counted = {name: CLAUDE[name] for name in CLAUDE.keys() - {"max_tokens", "stream", "metadata"}}
    response = await client.post(f"{COUNT}?beta=true", json=counted, headers=BETA)
    assert response.json() == {"input_tokens": prompt}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"context_management": {"edits": [{"type": "x"}]}}, "context_management"),
        ({"tools": [SEARCH]}, "tools[0]"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"thinking": {"type": "disabled"}}, "thinking"),
        ({"service_tier": "fast"}, "service_tier"),
        ({"speed": "fast"}, "speed"),
        ({"mcp_servers": [{"type": "url", "url": "https://example.invalid"}]}, "mcp_servers"),
        ({"compaction": {"type": "enabled"}}, "compaction"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "redacted_thinking", "data": "EqQB"}, {"type": "text", "text": "a"}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "server_tool_use", "id": "1", "name": "web_search", "input": {}},
            {"type": "text", "text": "a"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": [
                {"type": "image", "source": {"type": "base64", "data": ""}}]}]}]},
         "messages[0].content[0].content[0]"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
async def test_a_hint_is_named_and_refused_only_by_a_strict_server(
    make_client: MakeClient, fields: dict[str, Any], name: str
) -> None:
    body = {"model": MODEL, "max_tokens": 9, "messages": CLAUDE["messages"], **fields}
    formats = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}
    response = await make_client(**formats).post(PATH, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["x-quire-ignored-params"] == name
    response = await make_client(**formats, strict=True).post(PATH, json=body)
    assert_refused(response, 400, "invalid_request_error", name)


async def test_a_strict_server_does_not_reduce_max_tokens(make_client: MakeClient) -> None:
    body = {"model": MODEL, "max_tokens": 32_000, "messages": CLAUDE["messages"]}
    response = await make_client(strict=True).post(PATH, json=body)
    assert_refused(response, 400, "invalid_request_error", "max_tokens")
    body["messages"] = [{"role": "user", "content": "x" * 9_001}]
    response = await make_client().post(PATH, json=body)
    assert_refused(response, 400, "invalid_request_error")


async def test_omitted_thinking_comes_back_sealed(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    engine.scripts = say("<think>Because é.</think>Yes.")
    thinking = {"type": "adaptive", "display": "omitted"}
    answer = await create(client, thinking=thinking)
    block, text = answer["content"]
    assert (block["thinking"], text["text"]) == ("", "Yes.")
    counted = answer["usage"]["output_tokens_details"]["thinking_tokens"]
    assert len("Because é.".encode()) <= counted <= len("<think>Because é.</think>".encode())
    events = await stream(client, thinking=thinking)
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert deltas[0] == {"type": "signature_delta", "signature": block["signature"]}
    assert deltas[1]["type"] == "text_delta"
    history = [*CLAUDE["messages"], {"role": "assistant", "content": answer["content"]},
               {"role": "user", "content": "Why?"}]  # fmt: skip
    await create(client, messages=history)
    assert "<think>Because é.</think>Yes." in prompt_text(engine, tokenizer)
    redacted = {"type": "redacted_thinking", "data": block["signature"]}
    history[-2] = {"role": "assistant", "content": [redacted, text]}
    await create(client, messages=history)
    assert "<think>Because é.</think>Yes." in prompt_text(engine, tokenizer)
    shown = (await create(client))["content"][0]
    assert shown["thinking"] == "Because é." and shown["signature"]


async def test_deferred_tools_are_shown_once_a_message_refers_to_them(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    user: dict[str, Any] = {"role": "user", "content": "hi"}

    async def offered(*more: dict[str, Any], tools: list[dict[str, Any]]) -> list[str]:
        await create(client, messages=[user, *more], tools=tools)
        text = prompt_text(engine, tokenizer)
        lines = [line for line in text.split("\n") if line.startswith('{"type": "function"')]
        return [json.loads(line)["function"]["name"] for line in lines]

    def system(kind: str, tool: dict[str, Any]) -> dict[str, Any]:
        return {"role": "system", "content": [{"type": kind, "tool": tool}]}

    both = [BASH, FETCH]
    assert await offered(tools=both) == ["Bash"]
    found = {"type": "tool_reference", "tool_name": "WebFetch"}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [found]}
    use = {
        "role": "assistant",
        "content": [
            {"type": "tool_use", "id": "1", "name": "ToolSearch", "input": {"query": "fetch"}}
        ],
    }
    assert await offered(use, {"role": "user", "content": [result]}, tools=both) == [
        "Bash", "WebFetch"
    ]  # fmt: skip
    assert "tool\nThe tool WebFetch can be called now.<" in prompt_text(engine, tokenizer)
    reference = {"type": "tool_reference", "name": "WebFetch"}
    assert await offered(system("tool_addition", reference), tools=both) == ["Bash", "WebFetch"]
    definition = {"type": "tool_definition", "definition": {**BASH, "name": "New"}}
    assert await offered(system("tool_addition", definition), tools=both) == ["Bash", "New"]
    removed = system("tool_removal", {"type": "tool_reference", "name": "Bash"})
    assert await offered(removed, tools=both) == []
    # A search that only Anthropic's servers have would find them, so they are all shown.
    search = {"type": "tool_search_tool_bm25_20251119", "name": "tool_search_tool_bm25"}
    assert await offered(tools=[*both, search]) == ["Bash", "WebFetch"]


async def test_results_and_documents_become_text(
    client: httpx.AsyncClient, engine: FakeEngineClient, tokenizer: Tokenizer
) -> None:
    text = {"type": "text", "text": "T"}
    document = {"type": "document", "title": "D", "source": {
        "type": "text", "media_type": "text/plain", "data": "data"}}  # fmt: skip
    found = {"type": "search_result", "source": "https://example.invalid", "title": "S",
             "content": [text]}  # fmt: skip
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    pdf = {"type": "document", "source": {"type": "base64", "data": ""}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [text, image, pdf, found]}
    await create(client, messages=[{"role": "user", "content": [document, text, result, text]}])
    turns = prompt_text(engine, tokenizer).split("<|im_start|>")[1:]
    assert turns == [
        "user\nD\ndata\nT<|im_end|>\n",
        "tool\nT\n[image omitted: this server reads only text]\n"
        "[document omitted: this server reads only text]\nS\nhttps://example.invalid\nT<|im_end|>\n",
        "user\nT<|im_end|>\n",
        "assistant\n",
    ]
    for block, name in ((image, "content[0].type"), (pdf, "content[0].source.type")):
        body = {**CLAUDE, "messages": [{"role": "user", "content": [block]}]}
        assert_refused(await client.post(PATH, json=body), 400, "invalid_request_error", name)


async def test_a_budget_becomes_the_chats_or_a_hint(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    body = {"model": MODEL, "max_tokens": 40, "messages": CLAUDE["messages"],
            "thinking": {"type": "enabled", "budget_tokens": 31_999}}  # fmt: skip
    response = await client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    named = response.headers.get("x-quire-ignored-params")
    assert named in (None, "thinking.budget_tokens")


async def test_the_sdks_betas(served: str, engine: FakeEngineClient) -> None:
    engine.scripts = say(call("Bash", {"command": "ls"}))
    async with anthropic.AsyncAnthropic(base_url=served, api_key="secret", max_retries=0) as sdk:
        fields = {name: CLAUDE[name] for name in CLAUDE.keys() - {"stream"}}
        fields["max_tokens"] = 500
        async with sdk.beta.messages.stream(**fields, betas=["effort-2025-11-24"]) as events:
            final = await events.get_final_message()
        [block] = final.content
        assert block.type == "tool_use" and block.input == {"command": "ls"}
        assert final.stop_reason == "tool_use"
        again = [
            *CLAUDE["messages"],
            {"role": "assistant", "content": final.content},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": block.id, "content": "a b"}]},
        ]  # fmt: skip
        engine.scripts = say("<think>Two.</think>Two files.")
        answer = await sdk.beta.messages.create(**{**fields, "messages": again})
        assert [each.type for each in answer.content] == ["thinking", "text"]
