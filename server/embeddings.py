"""POST /v1/embeddings: understood and refused, for the served model generates text.

The engine makes logits of the positions that are sampled and keeps no hidden states, so there is
nothing to pool.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from ..engine.errors import InvalidRequestError
from .answers import refusals_counted
from .body import read_json_object
from .protocol import Label, Prompt, check_types
from .state import state_of
from .translation import Fields

MAX_DIMENSIONS = 65_536

router = APIRouter()


class EmbeddingBody(Fields):
    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    user: Label | None = None


@router.post("/v1/embeddings", response_model=None)
async def create_embedding(request: Request) -> Response:
    """Refuses: the served model generates text."""
    state = state_of(request)
    with refusals_counted(state):
        fields = await read_json_object(request)
        body, _ = check_types(EmbeddingBody, fields, strict=state.settings.strict)
        state.check_model(body.model)
        parts = body.input if isinstance(body.input, list) else [body.input]
        if not parts or "" in parts or [] in parts:
            raise InvalidRequestError("the input is empty", "input")
        raise InvalidRequestError(
            f"the model {state.model_name!r} is served for generation and makes no embeddings",
            "model",
        )
