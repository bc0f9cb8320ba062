"""The OpenAPI document can be read without a key, and its examples run as they are."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from quire.engine.classifier_spec import ClassifierSpec
from quire.engine.embedding_spec import EmbeddingSpec
from quire.server.serving.openapi import EXAMPLES

from ..conftest import make_app
from ..fakes import CHAT_TEMPLATE, FakeEngineClient, byte_tokenizer

KEY = {"authorization": "Bearer secret"}


def client_of(engine: FakeEngineClient) -> httpx.AsyncClient:
    app = make_app(engine, byte_tokenizer(CHAT_TEMPLATE), api_key=("secret",))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://quire")


async def bodies() -> dict[str, dict[str, Any]]:
    async with client_of(FakeEngineClient()) as client:
        document = (await client.get("/openapi.json")).json()
    return {
        path: operation["requestBody"]["content"]["application/json"]["example"]
        for path, operations in document["paths"].items()
        for operation in operations.values()
        if "requestBody" in operation
    }


async def test_every_body_has_an_example_that_names_the_served_model() -> None:
    found = await bodies()
    assert found.keys() == EXAMPLES.keys()
    assert found["/v1/chat/completions"]["model"] == "tiny"


@pytest.mark.parametrize("path", [path for path in EXAMPLES if "lora" not in path])
async def test_an_example_runs(path: str) -> None:
    """Those of adapters name a folder of the server's, which is not here."""
    engine = FakeEngineClient()
    if path == "/v1/embeddings":
        engine.embedding = EmbeddingSpec(size=4, pooling="last", normalize=True)
    if path in ("/v1/rerank", "/v1/score", "/v1/classify"):
        engine.classifier = ClassifierSpec(labels=("relevance",), activation="sigmoid")
    async with client_of(engine) as client:
        made = await client.post("/v1/conversations", json={}, headers=KEY)
        url = path.replace("{conversation_id}", made.json()["id"])
        answer = await client.post(url, json=(await bodies())[path], headers=KEY)
        assert answer.status_code == 200, answer.text
        assert (await client.post(url, json={})).status_code == 401
