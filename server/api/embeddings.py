"""POST /v1/embeddings, for models whose folder says how their hidden states are pooled."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from ...engine.embedding_spec import EmbeddingSpec
from ...engine.errors import ContextLengthError, InvalidRequestError
from ...engine.sampling_params import SamplingParams
from ..errors import client_left
from ..http.body import read_json_object
from ..http.limits import Ticket
from ..http.route_docs import (
    GENERATION_ERRORS,
    OBJECTS,
    answers,
    errors,
    json_body,
    json_object,
)
from ..http.sse import run_until_disconnect
from ..json_text import encode_json
from ..requests.field_types import Fields, Label, OptionalLabel, Priority, Prompt, Seconds
from ..requests.generation import Generation, collect
from ..requests.job import Job, JobParts, make_job
from ..requests.preparation import asked_by, prompts_of
from ..requests.protocol import GenerationBody, check_types
from ..requests.state import ServerState, state_of
from .answers import ignored_header, refusals_counted
from .translation import renamed

MAX_DIMENSIONS = 65_536
"""Maximum of `dimensions` that the type check accepts; the model's own bound is smaller."""

router = APIRouter(tags=["embeddings"])


class EmbeddingBody(Fields):
    """One or more inputs, as text or token ids, and the form of their vectors."""

    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: Priority | None = None
    cache_salt: Label | None = None
    user: OptionalLabel = None
    timeout: Seconds | None = None


@router.post(
    "/v1/embeddings",
    response_model=None,
    openapi_extra=json_body(EmbeddingBody),
    responses={
        **answers(json_object("object", "data", "model", "usage", data=OBJECTS)),
        **errors(*GENERATION_ERRORS),
    },
)
async def create_embedding(request: Request) -> Response:
    """Return a vector for each input."""
    state = state_of(request)
    with refusals_counted(state.metrics), renamed({"prompt": "input"}):
        fields = await read_json_object(request)
        body, ignored = check_types(EmbeddingBody, fields, strict=state.settings.strict)
        state.check_model(body.model)
        spec, job, ticket = await _prepare(state, body)
    job = asked_by(job, state.keys.owner(request), body.user)
    generation = Generation(state, job, ticket, request.state.request_id)
    with ticket:
        answers = await run_until_disconnect(
            request.receive, collect(generation, job.n), job.deadline
        )
    if answers is None:
        return client_left()
    content = await _answer(body, spec, generation, state.name_of(body.model))
    return Response(content, media_type="application/json", headers=ignored_header(ignored))


async def _prepare(state: ServerState, body: EmbeddingBody) -> tuple[EmbeddingSpec, Job, Ticket]:
    """Admit and tokenise the inputs. Raises QuireError, and then closes the ticket."""
    arrival = time.monotonic()
    inputs = prompts_of(body.input, state.settings.max_prompts_per_request)
    info = state.engine.info
    spec = info.embedding
    if isinstance(spec, str):
        raise InvalidRequestError(
            f"the model {state.model_name!r} does not produce embeddings: {spec}", "model"
        )
    spec.check_dimensions(body.dimensions)
    keep = tokens_to_keep(body.truncate_prompt_tokens, info.max_model_len)
    keep_end = body.truncation_side == "left"
    characters = sum(len(item) for item in inputs if isinstance(item, str))
    tokens = sum(len(item) for item in inputs if not isinstance(item, str))
    ticket = state.in_flight.admit(len(inputs), characters, tokens)
    try:
        state.check_ready()
        prompts = []
        for item in inputs:
            if isinstance(item, str):
                item = await state.tokenizer.encode(
                    spec.prompt + item,
                    add_special_tokens=body.add_special_tokens is not False,
                    max_tokens=info.max_model_len,
                    keep=keep,
                    keep_end=keep_end,
                )
            elif keep is not None:
                item = item[-keep:] if keep_end else item[:keep]
            prompts.append(item)
        longest = max(map(len, prompts))
        if longest > info.max_model_len:
            raise ContextLengthError.of_prompt(longest, info.max_model_len, "input", answered=False)
        fields = GenerationBody(
            model=body.model,
            max_tokens=0,
            priority=body.priority,
            cache_salt=body.cache_salt,
            timeout=body.timeout,
        )
        params = SamplingParams(max_tokens=0)
        parts = JobParts(arrival=arrival, pooling=spec.pooling)
        job = make_job(state, fields, params, prompts, parts)
        ticket.tokenised(sum(map(len, prompts)))
    except BaseException:
        ticket.close()
        raise
    return spec, job, ticket


def tokens_to_keep(truncate_prompt_tokens: int | None, max_model_len: int) -> int | None:
    """Return how many tokens of each input to keep; None for all. Raises InvalidRequestError."""
    if truncate_prompt_tokens is None:
        return None
    if truncate_prompt_tokens == -1:
        return max_model_len
    if not 1 <= truncate_prompt_tokens <= max_model_len:
        raise InvalidRequestError(
            f"truncate_prompt_tokens must be -1 or from 1 to {max_model_len}",
            "truncate_prompt_tokens",
        )
    return truncate_prompt_tokens


async def _answer(
    body: EmbeddingBody, spec: EmbeddingSpec, generation: Generation, model: str
) -> bytes:
    """Return the answer's JSON, yielding to other tasks after each vector (up to a millisecond)."""
    parts = [b'{"object":"list","data":[']
    for index, data in enumerate(generation.embeddings):
        assert data is not None  # `collect` raises if one is missing
        vector = np.frombuffer(data, dtype="<f4")[: body.dimensions]
        if spec.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        embedding: list[float] | str = vector.tolist()
        if body.encoding_format == "base64":
            embedding = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        entry = encode_json({"object": "embedding", "index": index, "embedding": embedding})
        parts += [b"," * (index > 0), entry]
        await asyncio.sleep(0)
    num_tokens = generation.num_prompt_tokens
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    tail = encode_json({"model": model, "usage": usage})
    return b"".join([*parts, b"],", tail[1:]])
