"""Predicted outputs through the whole server, on a tiny random model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers.models.llama import LlamaConfig

from quire.engine.config import EngineConfig
from quire.server.text.tokenizer import Tokenizer

from ...engine.inline_client import InlineEngineClient
from ...engine.models import COMMON, build_model
from ..conftest import make_app
from ..fakes import CHAT_TEMPLATE, IM_END, FakeEngineClient, byte_tokenizer, ids
from ..openai_http import CHAT, HI, stream
from ..real_engine import make_core, running
from .test_hints import HEADER, client_of

LETTERS = ids("abcdefghijklmnopqrstuvwxyz")
FIELDS: dict[str, Any] = {
    **HI,
    "max_tokens": 40,
    "temperature": 0,
    "ignore_eos": True,
    "allowed_token_ids": LETTERS,
}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return byte_tokenizer(CHAT_TEMPLATE)


@asynccontextmanager
async def served(
    folder: Path, tokenizer: Tokenizer, **config: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Serve a random model whose layers are compiled."""
    sizes = COMMON | {"vocab_size": tokenizer.vocab_size, "eos_token_id": IM_END}
    build_model(
        LlamaConfig(**sizes | {"bos_token_id": None, "max_position_embeddings": 512})
    ).save_pretrained(folder)
    settings = {"device": "cpu", "num_threads": 1, "num_blocks": 256, **config}
    engine = InlineEngineClient(EngineConfig(model=str(folder), **settings), make_core)
    async with running(make_app(engine, tokenizer), engine) as client:
        yield client


async def ask(client: httpx.AsyncClient, **fields: Any) -> tuple[str, dict[str, int]]:
    """Return the text of an answer, and the details of its tokens; they are those of the stream."""
    response = await client.post(CHAT, json={**FIELDS, **fields})
    assert response.status_code == 200, response.text
    assert HEADER not in response.headers
    answer = response.json()
    chunks = await stream(client, CHAT, **FIELDS, **fields, stream_options={"include_usage": True})
    usage = chunks.pop()["usage"]
    text: str = answer["choices"][0]["message"]["content"]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text
    details: dict[str, int] = answer["usage"]["completion_tokens_details"]
    assert usage["completion_tokens_details"].keys() == details.keys()
    assert usage["completion_tokens"] == answer["usage"]["completion_tokens"]
    return text, details


@pytest.mark.parametrize("in_parts", [False, True])
async def test_a_prediction_is_verified(
    tmp_path: Path, tokenizer: Tokenizer, in_parts: bool
) -> None:
    """The prefix cache is off, so that nothing else than the prediction knows the answer."""
    async with served(tmp_path, tokenizer, enable_prefix_caching=False) as client:
        text, details = await ask(client)
        assert details == {"reasoning_tokens": 0} and len(text) == 40

        def prediction(content: str) -> dict[str, Any]:
            half = len(content) // 2
            parts = [{"type": "text", "text": part} for part in (content[:half], content[half:])]
            return {"type": "content", "content": parts if in_parts else content}

        # 1. All of it is right, whatever was drafted of it.
        found, details = await ask(client, prediction=prediction(text))
        assert found == text
        assert details["accepted_prediction_tokens"] > 20
        assert details["rejected_prediction_tokens"] == 0
        # 2. It ends with a stop string.
        found, details = await ask(client, prediction=prediction(text), stop=text[30:36])
        assert found == text[: text.index(text[30:36])]
        # 3. None of it is right.
        wrong = "".join("a" if letter != "a" else "b" for letter in text)
        found, details = await ask(client, prediction=prediction(wrong))
        assert found == text
        assert details["rejected_prediction_tokens"] > 0


async def test_a_prediction_longer_than_the_context_is_cut(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    async with served(tmp_path, tokenizer) as client:
        _, details = await ask(client, prediction={"type": "content", "content": "ab" * 5000})
        assert "rejected_prediction_tokens" in details


async def test_an_engine_that_does_not_speculate_names_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    fields = {**FIELDS, "prediction": {"type": "content", "content": "x"}}
    async with served(tmp_path, tokenizer, speculation="off") as client:
        response = await client.post(CHAT, json=fields)
        assert response.headers[HEADER] == "prediction"
        details = response.json()["usage"]["completion_tokens_details"]
        assert details == {"reasoning_tokens": 0}
    async with client_of(FakeEngineClient(), tokenizer, strict=True) as strict:
        response = await strict.post(CHAT, json={**HI, "prediction": fields["prediction"]})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prediction"


@pytest.mark.parametrize(
    "prediction", ["x", {"content": "x"}, {"type": "tokens", "content": "x"}, {"type": "content"}]
)
async def test_what_is_no_prediction_is_refused(tokenizer: Tokenizer, prediction: Any) -> None:
    async with client_of(FakeEngineClient(), tokenizer) as client:
        response = await client.post(CHAT, json={**HI, "prediction": prediction})
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith("prediction")
