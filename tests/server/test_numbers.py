"""Numbers at the edges of their types, in every field that takes a number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from quire.engine.process import wire
from quire.server.serving.openapi import openapi_document

from .conftest import MakeClient
from .fakes import FakeEngineClient
from .openai_http import HI, PROMPT

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": PROMPT,
    "/v1/chat/completions": HI,
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {**HI, "max_tokens": 5},
    "/v1/messages/count_tokens": HI,
    "/v1/embeddings": {"input": "Hi"},
    "/v1/rerank": {"query": "q", "documents": ["d"]},
    "/v1/score": {"text_1": "q", "text_2": "d"},
    "/v1/classify": {"input": "Hi"},
    "/tokenize": PROMPT,
    "/detokenize": {"tokens": [1]},
}
NESTED = [
    ("/v1/messages", "budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": None}}),
    ("/v1/completions", "5", {"logit_bias": {"5": None}}),
    ("/v1/completions", "stop_token_ids", {"stop_token_ids": [None]}),
    ("/v1/completions", "prompt", {"prompt": [None]}),
    ("/detokenize", "tokens", {"tokens": [None]}),
]
NUMBERS = [
    *(sign * 2**bits + plus for bits in (31, 53, 63, 64) for sign in (1, -1) for plus in (-1, 0)),
    10**400,
    1e308,
    -1e308,
    5e-324,
    1e-45,
]


def numeric_fields(client: httpx.AsyncClient) -> Iterator[tuple[str, str]]:
    """Yield each endpoint's fields whose schema admits a number."""
    document = openapi_document(client.app)  # type: ignore[attr-defined]
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        schema = json.dumps(content)
        for name, model in document["components"]["schemas"].items():
            if f'/schemas/{name}"' in schema:
                schema += json.dumps(model)
                for field, described in model.get("properties", {}).items():
                    text = json.dumps(described)
                    if '"type": "integer"' in text or '"type": "number"' in text:
                        yield path, field


@pytest.mark.parametrize("path", BODIES)
async def test_numbers_at_the_edges_are_refused_by_name_or_reach_the_engine(
    make_client: MakeClient, engine: FakeEngineClient, path: str
) -> None:
    client = make_client()
    found = {field for at, field in numeric_fields(client) if at == path}
    assert found or not path.startswith("/v1/")
    cases = [(field, {field: None}) for field in sorted(found)]
    cases += [(field, fields) for at, field, fields in NESTED if at == path]
    for field, fields in cases:
        for number in NUMBERS:
            text = json.dumps({**BODIES[path], **fields})
            marked = json.dumps(fields)[1:-1]
            body = text.replace(marked, marked.replace("null", json.dumps(number)))
            assert body != text
            response = await client.post(
                path, content=body, headers={"content-type": "application/json"}
            )
            expected = (200, 400, 504) if field == "timeout" else (200, 400)
            assert response.status_code in expected, (field, number, response.text)
            for request in engine.requests:
                assert wire.decode_to_engine(wire.encode(wire.Add(request))) == wire.Add(request)
            engine.requests.clear()
