"""Budgets of reasoning through the whole server, on a tiny random model, and what is counted."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import transformers
from tokenizers import Tokenizer as Encoder
from tokenizers import models
from transformers.models.llama import LlamaConfig

from quire.engine.config import EngineConfig
from quire.server.text.tokenizer import Tokenizer

from ...engine.inline_client import InlineEngineClient
from ...engine.models import COMMON, build_model
from ..conftest import MakeClient, make_app
from ..fakes import CHAT_TEMPLATE, IM_END, FakeEngineClient, Script, byte_tokenizer, ids, say
from ..openai_http import CHAT, COMPLETIONS, HI, PROMPT, assert_error, stream
from ..real_engine import make_core, running
from .test_calls_or_answer import ANALYSIS, HARMONY_CONTROL, HARMONY_TEMPLATE, client_of
from .test_tool_calls import TOOL

TAGS = ("<think>", "</think>")
OPENED = CHAT_TEMPLATE.removesuffix("{% endif %}") + "<think>\n{% endif %}"


@asynccontextmanager
async def served(folder: Path, tokenizer: Tokenizer) -> AsyncIterator[httpx.AsyncClient]:
    """Serve a random model with this tokenizer."""
    sizes = COMMON | {"vocab_size": tokenizer.vocab_size, "eos_token_id": IM_END}
    config = LlamaConfig(**sizes | {"bos_token_id": None, "max_position_embeddings": 1024})
    build_model(config).save_pretrained(folder)
    tokenizer._hf.save_pretrained(folder)
    engine = InlineEngineClient(
        EngineConfig(
            model=str(folder), device="cpu", dtype="float32", num_threads=1, num_blocks=256
        ),
        make_core,
    )
    app = make_app(engine, tokenizer, tool_call_parser="hermes")
    async with running(app, engine) as client:
        yield client


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {**HI, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True, **fields}
    response = await client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert "x-quire-ignored-params" not in response.headers
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("special", [TAGS, ()], ids=["one token", "text"])
async def test_exactly_the_budget_is_reasoning(tmp_path: Path, special: tuple[str, ...]) -> None:
    """The template opens the reasoning; the random model never ends it by itself."""
    tokenizer = byte_tokenizer(OPENED, special)
    end = tokenizer.backend.encode("</think>", add_special_tokens=False).ids
    assert len(end) == (1 if special else 8)
    async with served(tmp_path, tokenizer) as client:
        for temperature in (0, 1):
            settings = {"temperature": temperature, "seed": 3, "n": 3}
            free = await ask(client, **settings)
            details = free["usage"]["completion_tokens_details"]
            assert details["reasoning_tokens"] == 3 * 40
            for budget in (0, 1, 9):
                answer = await ask(client, **settings, thinking_token_budget=budget)
                reasoning = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
                assert reasoning == 3 * budget
                for choice, plain in zip(answer["choices"], free["choices"], strict=True):
                    tokens = choice["token_ids"]
                    assert tokens[:budget] == plain["token_ids"][:budget]
                    assert tokens[budget : budget + len(end)] == end
                    assert choice["message"]["content"]
                await same_when_streamed(client, answer, **settings, thinking_token_budget=budget)
            whole = await ask(client, **settings, thinking_token_budget=40)
            tokens = [choice["token_ids"] for choice in whole["choices"]]
            assert tokens == [choice["token_ids"] for choice in free["choices"]]


async def same_when_streamed(
    client: httpx.AsyncClient, answer: dict[str, Any], **fields: Any
) -> None:
    body = {**HI, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True, **fields}
    chunks = await stream(client, CHAT, **body, stream_options={"include_usage": True})
    assert (
        chunks.pop()["usage"]["completion_tokens_details"]
        == (answer["usage"]["completion_tokens_details"])
    )
    for index, choice in enumerate(answer["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        for name in ("content", "reasoning"):
            text = "".join(one["delta"].get(name) or "" for one in mine)
            assert text == (choice["message"].get(name) or "")
        assert [token for one in mine for token in one.get("token_ids", ())] == choice["token_ids"]


async def test_a_grammar_follows_the_budget(tmp_path: Path) -> None:
    """The model is made to answer 36 or to call, after 5 tokens of reasoning."""
    tokenizer = byte_tokenizer(OPENED, TAGS)
    async with served(tmp_path, tokenizer) as client:
        schema = {"type": "integer", "minimum": 36, "maximum": 36}
        format = {"type": "json_schema", "json_schema": {"name": "age", "schema": schema}}
        structure = {"response_format": format}
        for fields in (structure, {**structure, "tools": [TOOL]}):
            for seed in range(3):
                answer = await ask(
                    client, **fields, seed=seed, max_tokens=200, thinking_token_budget=5
                )
                [choice] = answer["choices"]
                reasoning = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
                assert 5 <= reasoning <= 8  # a character is completed first
                message = choice["message"]
                if message["content"] is not None:
                    assert json.loads(message["content"]) == 36
                    assert choice["finish_reason"] == "stop"
                else:
                    assert message["tool_calls"][0]["function"]["name"] == "weather"


async def test_reasoning_tokens_are_counted_between_the_tags(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    for text, count in (
        ("<think>\nHm.\n</think>\n\nYes.", 5),
        ("Yes, <think>no</think>.", 0),
        ("<think>never ends", 10),
        ("\n<think></think>Yes.", 0),
    ):
        engine.scripts = say(text)
        usage = (await client.post(CHAT, json={**HI, "n": 2})).json()["usage"]
        # The end-of-sequence token belongs to whatever it ends.
        count += text.endswith("ends")
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 2 * count}, text


async def test_harmony_ends_its_analysis(engine: FakeEngineClient) -> None:
    tokenizer = byte_tokenizer(HARMONY_TEMPLATE, HARMONY_CONTROL)
    special = tokenizer.special_ids
    encode = partial(tokenizer.backend.encode, add_special_tokens=False)
    async with client_of(engine, tokenizer) as client:
        tokens = encode(f"{ANALYSIS}Hm, so.<|end|><|start|>assistant<|channel|>final").ids
        tokens += encode("<|message|>Yes.").ids
        engine.scripts = lambda request, choice: Script(tokens)
        response = await client.post(CHAT, json={**HI, "thinking_token_budget": 7})
        assert response.json()["choices"][0]["message"]["content"] == "Yes."
        details = response.json()["usage"]["completion_tokens_details"]
        assert details == {"reasoning_tokens": 7}
        spec = engine.requests[-1].reasoning
        assert spec is not None and spec.budget == 7 and not spec.begins_inside
        end = "<|end|><|start|>assistant<|channel|>"
        assert list(spec.end) == encode(end).ids and spec.end[0] == special["<|end|>"]
        assert list(spec.after_end) == ids("f")
        await client.post(CHAT, json={**HI, "thinking_token_budget": 7, "tools": [TOOL]})
        spec = engine.requests[-1].reasoning
        assert spec is not None and list(spec.after_end) == ids("fc")


async def test_requests_without_a_budget_bring_nothing_to_the_engine(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    await client.post(CHAT, json=HI)
    assert engine.requests[-1].reasoning is None


async def test_a_continued_answer_may_still_be_in_its_reasoning(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    for text, inside in (("<think>\nWell", True), ("<think>a</think>Well", None)):
        messages = [*HI["messages"], {"role": "assistant", "content": text}]
        fields = {"messages": messages, "continue_final_message": True, "thinking_token_budget": 2}
        response = await client.post(CHAT, json={**HI, **fields})
        assert response.status_code == 200
        spec = engine.requests[-1].reasoning
        assert (spec and spec.begins_inside) == inside


async def test_budgets_that_cannot_be_served(
    client: httpx.AsyncClient, make_client: MakeClient, engine: FakeEngineClient
) -> None:
    for fields, param in (
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"thinking_token_budget": True}, "thinking_token_budget"),
        ({"thinking_token_budget": 5, "allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"thinking_token_budget": 5, "use_beam_search": True}, "use_beam_search"),
    ):
        response = await client.post(CHAT, json={**HI, **fields})
        assert_error(response, 400, "invalid_value", param)
    response = await client.post(COMPLETIONS, json={**PROMPT, "thinking_token_budget": 5})
    assert_error(response, 400, "invalid_value", "thinking_token_budget")
    # A model that does not reason keeps every budget.
    body = {**HI, "thinking_token_budget": 5}
    response = await make_client(reasoning_parser="none").post(CHAT, json=body)
    assert response.headers["x-quire-ignored-params"] == "thinking_token_budget"
    response = await make_client(reasoning_parser="none", strict=True).post(CHAT, json=body)
    assert_error(response, 400, "invalid_value", "thinking_token_budget")
    assert len(engine.requests) == 1


async def test_a_vocabulary_that_cannot_spell_the_mark(engine: FakeEngineClient) -> None:
    encoder = Encoder(models.WordLevel({"hi": 0, "<unk>": 1}, unk_token="<unk>"))
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=encoder, unk_token="<unk>")
    hf.chat_template = "{{ messages[0].content }}{# <think> #}"
    async with client_of(engine, Tokenizer(hf)) as client:
        assert (await client.post(CHAT, json=HI)).status_code == 200
        response = await client.post(CHAT, json={**HI, "thinking_token_budget": 3})
        assert_error(response, 400, "invalid_value", "thinking_token_budget")
        assert "vocabulary" in response.json()["error"]["message"]


async def test_the_sdk_reads_the_count(client: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.scripts = say("<think>Hm.</think>Yes.")
    sdk = openai.AsyncOpenAI(base_url="http://quire/v1", api_key="x", http_client=client)
    answer = await sdk.chat.completions.create(**HI, extra_body={"thinking_token_budget": 9})
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3
