"""POST /v1/rerank and /v1/score: how relevant documents are to a query.

The bodies and answers are those of Jina, Cohere and vLLM. All documents of a query share its prefix
in the KV cache, because a pair begins with the query.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import AliasChoices, Field

from ...engine.errors import InvalidRequestError
from ..api.answers import ignored_header, refusals_counted
from ..api.embeddings import tokens_to_keep
from ..api.whole_answers import json_of
from ..errors import client_left
from ..http.body import read_json_object
from ..http.route_docs import GENERATION_ERRORS, OBJECTS, answers, errors, json_body, json_object
from ..requests.field_types import Fields
from ..requests.protocol import check_types
from ..requests.state import state_of
from .scores import Encode, Scored, ScoringFields, pair_encoder, score

router = APIRouter(tags=["rerank, score, classify"])

Text = Annotated[str, Field(min_length=1)]


class Document(Fields):
    """A document as an object, as Jina and Cohere allow it."""

    text: Text


class RerankBody(ScoringFields):
    """The body of /v1/rerank."""

    query: Text
    documents: Annotated[list[Text | Document], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool | None = None
    instruction: str | None = None


class ScoreBody(ScoringFields):
    """The body of /v1/score. One query is compared with every document, or each query with the
    document at its place."""

    queries: Annotated[Text | list[Text], Field(validation_alias=AliasChoices("queries", "text_1"))]
    documents: Annotated[
        Text | list[Text], Field(validation_alias=AliasChoices("documents", "items", "text_2"))
    ]
    instruction: str | None = None


@router.post("/v2/rerank", response_model=None, include_in_schema=False)
@router.post("/rerank", response_model=None, include_in_schema=False)
@router.post(
    "/v1/rerank",
    response_model=None,
    openapi_extra=json_body(RerankBody),
    responses={
        **answers(json_object("id", "model", "usage", "results", results=OBJECTS)),
        **errors(*GENERATION_ERRORS),
    },
)
async def rerank(request: Request) -> Response:
    """Return the documents by their relevance to the query, the most relevant first."""
    state = state_of(request)
    with refusals_counted(state.metrics):
        fields = await read_json_object(request)
        body, ignored = check_types(RerankBody, fields, strict=state.settings.strict)
        state.check_model(body.model)
        texts = [item if isinstance(item, str) else item.text for item in body.documents]
        pairs = [(body.query, text) for text in texts]
        scored = await _score(request, body, pairs)
    if scored is None:
        return client_left()
    answer = {
        "id": f"rerank-{request.state.request_id}",
        "model": state.name_of(body.model),
        "usage": scored.usage,
        "results": _ranked(body, texts, scored.scores[:, 0].tolist()),
    }
    return await json_of(answer, ignored_header(ignored))


def _ranked(body: RerankBody, texts: list[str], relevance: list[float]) -> list[dict[str, Any]]:
    order = sorted(range(len(texts)), key=lambda index: -relevance[index])
    results: list[dict[str, Any]] = []
    for index in order[: body.top_n or None]:
        result: dict[str, Any] = {"index": index, "relevance_score": relevance[index]}
        if body.return_documents is not False:
            result["document"] = {"text": texts[index]}
        results.append(result)
    return results


@router.post("/score", response_model=None, include_in_schema=False)
@router.post(
    "/v1/score",
    response_model=None,
    openapi_extra=json_body(ScoreBody),
    responses={
        **answers(json_object("id", "object", "model", "usage", "data", data=OBJECTS)),
        **errors(*GENERATION_ERRORS),
    },
)
async def score_pairs(request: Request) -> Response:
    """Return a score for each pair of a query and a document."""
    state = state_of(request)
    with refusals_counted(state.metrics):
        fields = await read_json_object(request)
        body, ignored = check_types(ScoreBody, fields, strict=state.settings.strict)
        state.check_model(body.model)
        pairs = _pairs(body)
        scored = await _score(request, body, pairs)
    if scored is None:
        return client_left()
    data = [
        {"object": "score", "index": index, "score": float(value)}
        for index, value in enumerate(scored.scores[:, 0])
    ]
    answer = {
        "id": f"score-{request.state.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": state.name_of(body.model),
        "data": data,
        "usage": scored.usage,
    }
    return await json_of(answer, ignored_header(ignored))


def _pairs(body: ScoreBody) -> list[tuple[str, str]]:
    """Return the pairs that a body asks for. Raises InvalidRequestError if they do not match."""
    queries = [body.queries] if isinstance(body.queries, str) else body.queries
    documents = [body.documents] if isinstance(body.documents, str) else body.documents
    if len(queries) == 1:
        queries = queries * len(documents)
    if not documents or len(queries) != len(documents):
        raise InvalidRequestError(
            f"{len(queries)} queries and {len(documents)} documents make no pairs: give one query, "
            "or as many as documents",
            "documents",
        )
    return list(zip(queries, documents, strict=True))


async def _score(
    request: Request, body: RerankBody | ScoreBody, pairs: list[tuple[str, str]]
) -> Scored | None:
    """Score each pair; None if the client leaves. Raises QuireError."""
    state = state_of(request)
    encoder, limit = pair_encoder(state), state.engine.info.max_model_len
    keep = tokens_to_keep(body.truncate_prompt_tokens, limit)
    encoders: list[Encode] = [
        partial(
            encoder.encode,
            query,
            document,
            instruction=body.instruction,
            max_tokens=limit,
            keep=keep,
        )
        for query, document in pairs
    ]
    characters = sum(len(query) + len(text) for query, text in pairs)
    return await score(request, body, encoders, num_characters=characters, param="documents")
