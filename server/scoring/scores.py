"""What rerank, score and classify share: one pass over each prompt, and scores of its end."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import Field

from ...engine.classifier_spec import Activation, ClassifierSpec
from ...engine.errors import ContextLengthError, InvalidRequestError
from ...engine.sampling_params import SamplingParams
from ..http.sse import run_until_disconnect
from ..requests.field_types import Fields, Label, OptionalLabel, Priority, Seconds
from ..requests.generation import Generation, collect
from ..requests.job import JobParts, make_job
from ..requests.preparation import asked_by
from ..requests.protocol import GenerationBody
from ..requests.state import ServerState, state_of
from .pairs import PairEncoder

Encode = Callable[[], Awaitable[list[int]]]
"""Tokenises one prompt."""


class ScoringFields(Fields):
    """The fields that the bodies of rerank, score and classify share."""

    model: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    use_activation: bool | None = None
    priority: Priority | None = None
    cache_salt: Label | None = None
    user: OptionalLabel = None
    timeout: Seconds | None = None


class Scored(NamedTuple):
    """The scores of each prompt `[prompts, labels]`, and the token counts of the answer."""

    scores: NDArray[np.float64]
    usage: dict[str, Any]


def classifier_of(state: ServerState) -> ClassifierSpec:
    """Return how the model makes scores. Raises InvalidRequestError if it makes none."""
    spec = state.engine.info.classifier
    if isinstance(spec, str):
        raise InvalidRequestError(
            f"the model {state.model_name!r} makes no scores: {spec}", "model"
        )
    return spec


def pair_encoder(state: ServerState) -> PairEncoder:
    """Return the encoder of pairs. Raises InvalidRequestError if the model does not score pairs."""
    spec = classifier_of(state)
    if len(spec.labels) > 1:
        raise InvalidRequestError(
            f"the model {state.model_name!r} does not score pairs: it has {len(spec.labels)} "
            "classes, and /v1/classify returns the score of each",
            "model",
        )
    return PairEncoder(state.tokenizer, state.score_template, spec)


async def score(
    request: Request,
    body: ScoringFields,
    prompts: Sequence[Encode],
    *,
    num_characters: int,
    param: str,
) -> Scored | None:
    """Score each of `prompts`, which have `num_characters` in total; None if the client leaves.

    `param` is the field that a prompt which is too long is an error of. Raises QuireError.
    """
    state = state_of(request)
    arrival = time.monotonic()
    spec = classifier_of(state)
    if len(prompts) > state.settings.max_prompts_per_request:
        limit = state.settings.max_prompts_per_request
        raise InvalidRequestError(f"{param}: more than {limit} texts in one request", param)
    ticket = state.in_flight.admit(len(prompts), num_characters)
    try:
        state.check_ready()
        token_ids = [await encode() for encode in prompts]
        _check_lengths(token_ids, state.engine.info.max_model_len, param)
        fields = GenerationBody(
            model=body.model,
            max_tokens=0,
            priority=body.priority,
            cache_salt=body.cache_salt,
            timeout=body.timeout,
        )
        parts = JobParts(arrival=arrival, pooling="classify")
        job = make_job(state, fields, SamplingParams(max_tokens=0), token_ids, parts)
        job = asked_by(job, state.keys.owner(request), body.user)
        ticket.tokenised(sum(map(len, token_ids)))
        generation = Generation(state, job, ticket, request.state.request_id)
    except BaseException:
        ticket.close()
        raise
    with ticket:
        answers = await run_until_disconnect(
            request.receive, collect(generation, job.n), job.deadline
        )
    if answers is None:
        return None
    rows = [np.frombuffer(row or b"", "<f4") for row in generation.embeddings]
    activation = "identity" if body.use_activation is False else spec.activation
    usage = generation.usage()
    return Scored(_activate(np.stack(rows).astype(np.float64), activation), usage)


def _check_lengths(prompts: list[list[int]], max_model_len: int, param: str) -> None:
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= max_model_len:
            what = f"text {index} of {param}" if len(prompts) > 1 else param
            raise ContextLengthError(
                f"{what} makes a prompt of {len(prompt)} tokens, but the model's maximum context "
                f"length is {max_model_len} tokens",
                param,
            )


def _activate(logits: NDArray[np.float64], activation: Activation) -> NDArray[np.float64]:
    if activation == "identity":
        return logits
    if activation == "softmax":
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
        return shares
    # 1 / (1 + exp(-x)) would overflow for a large negative x.
    probabilities: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -logits))
    return probabilities
