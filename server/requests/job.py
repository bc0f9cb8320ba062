"""Builds a job: the engine's requests for one HTTP request, and how their tokens become text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...engine.errors import InvalidRequestError, QueueTimeoutError, RequestTimeoutError
from ...engine.reasoning import ReasoningSpec
from ...engine.request import GrammarSpec, Pooling, Request
from ...engine.sampling_params import SamplingParams
from ..settings import Settings
from ..tenants.caller import salted
from .protocol import GenerationBody
from .sampling import with_max_tokens
from .state import ServerState

MAX_PROMPT_LOGPROBS = 1_000_000
"""Maximum entries (prompt tokens × (k + 1)) of prompt log-probabilities in one answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One HTTP request as the engine's work: a request for each prompt, and how to make its text.

    Each prompt is answered with `n` choices, of the `sampling_params.n` (best_of) that the engine
    makes.
    """

    requests: Sequence[Request]
    n: int
    stops: Sequence[str]
    include_stop: bool
    skip_special_tokens: bool
    shown_tokens: Sequence[str]
    """Control tokens that stay in the text, because the parser of the answer looks for them."""
    call_openings: Sequence[str]
    """The texts with which calls begin, if the answer is either calls or a structured text."""
    reasoning: ReasoningSpec | None
    """How the reasoning of a chat's answer is marked, if it can have any."""
    ignored: Sequence[str]
    """Paths of the body's fields that have no effect with this model or its chat template."""
    deadline: float | None
    prompt_changes: Sequence[str] = ()
    """What the prompt has elsewhere than the messages (constants of template_messages.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobParts:
    """The parts of a job that do not come from the fields which all bodies share."""

    arrival: float
    """When the HTTP request arrived, by `time.monotonic`."""
    max_tokens_param: str = "max_tokens"
    """The field of the body that holds max_tokens."""
    prompt_param: str = "prompt"
    """The field of the body from which the prompt is made."""
    caps_max_tokens: bool = False
    """Whether a max_tokens beyond the room that is left is reduced instead of refused."""
    default_max_tokens: int | None = None
    """The API's default max_tokens; None means the rest of the context."""
    grammar: GrammarSpec | None = None
    pooling: Pooling | None = None
    prediction: Sequence[int] = ()
    """The tokens that the client expects as the answer."""
    shown_tokens: Sequence[str] = ()
    """See `Job`."""
    call_openings: Sequence[str] = ()
    """See `Job`."""
    reasoning: ReasoningSpec | None = None
    """See `Job`."""
    ignored: Sequence[str] = ()
    """See `Job`."""


def make_job(
    state: ServerState,
    body: GenerationBody,
    params: SamplingParams,
    prompts: Sequence[list[int]],
    parts: JobParts,
) -> Job:
    """Return a job with a request for each of `prompts`, after checking that all of them fit.

    Raises QuireError.
    """
    deadlines = _deadlines(state.settings, body.timeout, parts.arrival)
    requests = [_make_request(state, body, params, prompt, parts, deadlines) for prompt in prompts]
    _check_prompt_logprobs(requests)
    deadlines.check()
    return Job(
        requests=requests,
        n=body.n or 1,
        stops=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        shown_tokens=parts.shown_tokens,
        call_openings=parts.call_openings,
        reasoning=parts.reasoning,
        ignored=[*parts.ignored, *_capped(requests, body, parts)],
        deadline=deadlines.total,
    )


def _make_request(
    state: ServerState,
    body: GenerationBody,
    params: SamplingParams,
    prompt: list[int],
    parts: JobParts,
    deadlines: _Deadlines,
) -> Request:
    """Return the engine's request for one prompt, after checking that it fits."""
    info = state.engine.info
    token_ids = _truncate(prompt, body, info.max_model_len)
    request = Request(
        request_id=uuid.uuid4().hex,
        prompt_token_ids=tuple(token_ids),
        sampling_params=with_max_tokens(
            params,
            getattr(body, parts.max_tokens_param),
            state.generation_defaults.get("max_new_tokens", parts.default_max_tokens),
            min_tokens=body.min_tokens or 0,
            num_prompt_tokens=len(token_ids),
            info=info,
            param=parts.max_tokens_param,
            prompt_param=parts.prompt_param,
            caps=parts.caps_max_tokens,
        ),
        arrival_time=parts.arrival,
        queue_deadline=deadlines.queue,
        deadline=deadlines.total,
        priority=body.priority or 0,
        cache_salt=salted(body.cache_salt, isolated=state.isolates_keys),
        grammar=parts.grammar,
        pooling=parts.pooling,
        reasoning=_with_budget(parts.reasoning),
        adapter=state.adapter_of(body.model),
        prediction=tuple(parts.prediction),
    )
    request.check_fits(info)
    return request


def _capped(requests: Sequence[Request], body: GenerationBody, parts: JobParts) -> list[str]:
    """Return the name of the field that holds max_tokens if it was reduced for a prompt."""
    asked = getattr(body, parts.max_tokens_param) or 0
    name = parts.max_tokens_param
    return [name] if any(one.sampling_params.max_tokens < asked for one in requests) else []


def _with_budget(reasoning: ReasoningSpec | None) -> ReasoningSpec | None:
    """Return what the engine needs to know of the reasoning: nothing if it has no budget."""
    return reasoning if reasoning is not None and reasoning.budget is not None else None


class _Deadlines(NamedTuple):
    """The times, by `time.monotonic`, until which a request must be finished and be started."""

    total: float | None
    queue: float | None

    def check(self) -> None:
        """Raise RequestTimeoutError or QueueTimeoutError if a deadline has passed already."""
        now = time.monotonic()
        if self.total is not None and now >= self.total:
            raise RequestTimeoutError("the request took longer than its timeout")
        if self.queue is not None and now >= self.queue:
            raise QueueTimeoutError("the request waited longer than the queue timeout")


def _deadlines(settings: Settings, timeout: float | None, arrival: float) -> _Deadlines:
    """Return the deadlines by the server's settings and the request's own `timeout`."""
    seconds = [limit for limit in (settings.request_timeout, timeout) if limit is not None]
    total = arrival + min(seconds) if seconds else None
    queue = total
    if settings.queue_timeout is not None:
        queue = min(arrival + settings.queue_timeout, total or float("inf"))
    return _Deadlines(total, queue)


def _truncate(token_ids: list[int], body: GenerationBody, max_model_len: int) -> list[int]:
    """Cut a prompt to truncate_prompt_tokens tokens; -1 keeps all that leave room for one more.

    truncation_side "left", the default, cuts its beginning off, and "right" its end. Raises
    InvalidRequestError.
    """
    limit = body.truncate_prompt_tokens
    if limit is None:
        return token_ids
    if limit < -1 or limit == 0:
        raise InvalidRequestError(
            "truncate_prompt_tokens must be -1 or at least 1", "truncate_prompt_tokens"
        )
    count = max_model_len - 1 if limit == -1 else limit
    return token_ids[:count] if body.truncation_side == "right" else token_ids[-count:]


def _check_prompt_logprobs(requests: Sequence[Request]) -> None:
    k = requests[0].sampling_params.prompt_logprobs
    if k is None:
        return
    entries = sum(len(request.prompt_token_ids) for request in requests) * (k + 1)
    if entries > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"prompt_logprobs asks for {entries} log-probabilities, more than the maximum of "
            f"{MAX_PROMPT_LOGPROBS}",
            "prompt_logprobs",
        )
