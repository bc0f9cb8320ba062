"""Requests generated from /openapi.json: no 5xx, no hang, answers as documented, no leftovers.

`QUIRE_FUZZ_EXAMPLES` is the number per operation; `make fuzz` sets a much larger one.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings
from pydantic import BaseModel
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from quire.engine.classifier_spec import ClassifierSpec
from quire.engine.embedding_spec import EmbeddingSpec
from quire.server.api.adapters import LoadBody, UnloadBody
from quire.server.api.embeddings import EmbeddingBody
from quire.server.dialects.conversations import ConversationUpdate, NewConversation, NewItems
from quire.server.dialects.messages_body import CountTokensBody, MessagesBody
from quire.server.dialects.responses_body import InputTokensBody, ResponseBody
from quire.server.requests.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    TokenizeChatBody,
)
from quire.server.scoring.classify import ClassifyBody
from quire.server.scoring.rerank import RerankBody, ScoreBody
from quire.server.serving.openapi import openapi_document

from .conftest import app_client, make_app
from .fakes import FakeEngineClient, byte_tokenizer, say

EXAMPLES = int(os.environ.get("QUIRE_FUZZ_EXAMPLES", "25"))
BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "/v1/completions": (CompletionBody,),
    "/v1/chat/completions": (ChatBody,),
    "/v1/responses": (ResponseBody,),
    "/v1/responses/input_tokens": (InputTokensBody,),
    "/v1/responses/compact": (InputTokensBody,),
    "/v1/conversations": (NewConversation,),
    "/v1/conversations/{conversation_id}": (ConversationUpdate,),
    "/v1/conversations/{conversation_id}/items": (NewItems,),
    "/v1/messages": (MessagesBody,),
    "/v1/messages/count_tokens": (CountTokensBody,),
    "/v1/embeddings": (EmbeddingBody,),
    "/v1/rerank": (RerankBody,),
    "/v1/score": (ScoreBody,),
    "/v1/classify": (ClassifyBody,),
    "/tokenize": (TokenizeBody, TokenizeChatBody),
    "/detokenize": (DetokenizeBody,),
    "/invocations": (ChatBody, CompletionBody, EmbeddingBody),
}
PUBLIC = {"/health", "/ready", "/live", "/ping", "/load", "/metrics", "/version"}
QUEUED = {"embeddings", "rerank", "score", "classify", "compact"}
"""Ends of the paths whose requests wait in the engine's queue but never stream."""
ADMIN_BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "/v1/load_lora_adapter": (LoadBody,),
    "/v1/unload_lora_adapter": (UnloadBody,),
}
"""Bodies of endpoints that refuse whoever has no admin key."""
LAST_EVENTS = {
    "/v1/responses": ("event: response.completed", "event: response.incomplete"),
    "/v1/messages": ("event: message_stop",),
}
SECONDS = 5.0
"""Seconds per request, far more than the fake engine needs."""


def _app(**options: Any) -> tuple[FastAPI, FakeEngineClient]:
    embedding = EmbeddingSpec(pooling="last", normalize=True, size=8, is_matryoshka=True)
    engine = FakeEngineClient(
        scripts=say("Hello, world"),
        embedding=embedding,
        classifier=ClassifierSpec(labels=("relevance",), activation="sigmoid"),
    )
    return make_app(engine, byte_tokenizer(), **options), engine


APP, ENGINE = _app(stream_resume_ttl=0.05)
schema = schemathesis.openapi.from_dict(openapi_document(APP))


ANSWERED: Counter[tuple[str, int]] = Counter()


def _thin_out(case: schemathesis.Case) -> None:
    """Drop the model, whose generated name is never served, and most of the other fields.

    Otherwise at least one of the many generated fields is always wrong.
    """
    body = case.body
    if case.path not in BODIES or not isinstance(body, dict):
        return
    body.pop("model", None)
    body.pop("timeout", None)  # a short one would rightly be answered with 504
    required = {"prompt", "messages", "tokens", "input", "max_tokens"}
    optional = [name for name in body if name not in required]
    for name in optional[len(str(body)) % 4 :]:
        del body[name]
    if isinstance(body.get("messages"), list):
        for message in body["messages"]:
            if isinstance(message, dict):
                message.pop("tool_calls", None)


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize="QUIRE_FUZZ_EXAMPLES" not in os.environ,
    database=None,
)
def test_generated_requests(case: schemathesis.Case) -> None:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=APP)  # raises exceptions that escape the application
        async with httpx.AsyncClient(transport=transport, base_url="http://quire") as client:
            request = case.as_transport_kwargs(base_url="http://quire")
            request.pop("cookies", None)
            if "data" in request:
                request["content"] = request.pop("data")
            async with asyncio.timeout(SECONDS):
                response = await client.request(**request)
        await APP.state.quire.streams.close()
        return response

    _thin_out(case)
    response = asyncio.run(call())
    ANSWERED[case.operation.label, response.status_code] += 1
    assert response.status_code < 500 or case.path in ("/ready",), response.text
    case.validate_response(
        response,
        checks=[status_code_conformance, content_type_conformance, response_schema_conformance],
    )
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        last = response.text.strip().split("\n\n")[-1]
        assert last.split("\n")[0] in LAST_EVENTS.get(case.path, ("data: [DONE]",))
    in_flight = APP.state.quire.in_flight
    left = (in_flight.num_queued, in_flight.num_running, in_flight.queued_tokens)
    assert left == (0, 0, 0)
    assert not ENGINE.running
    assert len(APP.state.quire.streams) == 0


def test_some_generated_requests_are_answered() -> None:
    """At least one generated request per endpoint was accepted."""
    for path in (path for path in BODIES if "{" not in path):
        assert ANSWERED[f"POST {path}", 200] > 0, ANSWERED


# --- the OpenAPI document


async def test_the_document_says_which_paths_require_a_key() -> None:
    app, _ = _app(api_key=("one",), admin_api_key="two")
    async with app_client(app) as client:
        for path, operations in openapi_document(app)["paths"].items():
            for method, operation in operations.items():
                answer = await client.request(method, path.replace("{", "").replace("}", ""))
                assert (
                    (answer.status_code == 401) == ("security" in operation) == (path not in PUBLIC)
                ), path


def test_bodies_and_streams_are_described() -> None:
    document = openapi_document(APP)
    schemas = document["components"]["schemas"]
    assert {
        path
        for path, operations in document["paths"].items()
        for operation in operations.values()
        if "requestBody" in operation
    } == BODIES.keys() | ADMIN_BODIES.keys()
    for path, models in (BODIES | ADMIN_BODIES).items():
        operation = document["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        names = [part["$ref"].rsplit("/", 1)[1] for part in body.get("anyOf", [body])]
        assert names == [model.__name__ for model in models]
        for name, model in zip(names, models, strict=True):
            assert set(schemas[name]["properties"]) == set(model.model_fields)
        assert {"400", "401", "404", "413", "415", "500", "503"} <= set(operation["responses"])
        streams = "stream" in models[0].model_fields
        assert ("text/event-stream" in operation["responses"]["200"]["content"]) == streams
        queues = streams or path.split("/")[-1] in QUEUED
        assert ("504" in operation["responses"]) == queues
        assert ("429" in operation["responses"]) == (
            path in BODIES
        )  # keys have limits, admins none


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9}),
    ],
)
async def test_events_match_their_schema(path: str, body: dict[str, Any]) -> None:
    async with app_client(APP) as client:
        response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200
    schema[path]["POST"].Case(body=body).validate_response(
        response, checks=[content_type_conformance, response_schema_conformance]
    )


async def test_the_docs_page_loads_nothing_external(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    assert "://" not in page
    assert "openapi.json" in page
