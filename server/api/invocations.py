"""POST /invocations: the endpoint of SageMaker's containers, for any kind of request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...engine.errors import InvalidRequestError
from ..http.body import read_json_object
from ..http.route_docs import GENERATION_ERRORS, OBJECT, answers, errors, json_body
from ..requests.protocol import ChatBody, CompletionBody
from .chat import create_chat_completion
from .completions import create_completion
from .embeddings import EmbeddingBody, create_embedding

router = APIRouter(tags=["operations"])

_ENDPOINTS: dict[str, Callable[[Request], Awaitable[Response]]] = {
    "messages": create_chat_completion,
    "prompt": create_completion,
    "input": create_embedding,
}
"""The field that tells a kind of request, and its endpoint."""


@router.post(
    "/invocations",
    response_model=None,
    openapi_extra=json_body(ChatBody, CompletionBody, EmbeddingBody),
    responses={**answers(OBJECT, stream=True), **errors(*GENERATION_ERRORS)},
)
async def invoke(request: Request) -> Response:
    """Answer a body with `messages` as a chat completion, one with `prompt` as a completion, and
    one with `input` as embeddings."""
    fields = await read_json_object(request)
    for name, endpoint in _ENDPOINTS.items():
        if fields.get(name) is not None:
            return await endpoint(request)
    raise InvalidRequestError(
        "the body needs messages (a chat), prompt (a completion) or input (embeddings)", "messages"
    )
