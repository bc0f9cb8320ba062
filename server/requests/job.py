"""Builds a job: the engine's requests for one HTTP request, and how their tokens become text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...engine.errors import InvalidRequestError, QueueTimeoutError, RequestTimeoutError
from ...engine.request import GrammarSpec, Pooling, Request
from ...engine.sampling_params import SamplingParams
from ..settings import Settings
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
    deadline: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobParts:
    """The parts of a job that do not come from the fields which all bodies share."""

    arrival: float
    """When the HTTP request arrived, by `time.monotonic`."""
    max_tokens_param: str = "max_tokens"
    """The field of the body that holds max_tokens."""
    default_max_tokens: int | None = None
    """The API's default max_tokens; None means the rest of the context."""
    grammar: GrammarSpec | None = None
    pooling: Pooling | None = None
    shown_tokens: Sequence[str] = ()
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
    # Over 50 lines: most of them are the fields of a request and of the job.
    info = state.engine.info
    deadlines = _deadlines(state.settings, body.timeout, parts.arrival)
    default = state.generation_defaults.get("max_new_tokens", parts.default_max_tokens)
    requests = []
    for prompt in prompts:
        token_ids = _truncate(prompt, body.truncate_prompt_tokens, info.max_model_len)
        request = Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=tuple(token_ids),
            sampling_params=with_max_tokens(
                params,
                getattr(body, parts.max_tokens_param),
                default,
                min_tokens=body.min_tokens or 0,
                num_prompt_tokens=len(token_ids),
                info=info,
                param=parts.max_tokens_param,
            ),
            arrival_time=parts.arrival,
            queue_deadline=deadlines.queue,
            deadline=deadlines.total,
            priority=body.priority or 0,
            cache_salt=body.cache_salt,
            grammar=parts.grammar,
            pooling=parts.pooling,
            adapter=state.adapter_of(body.model),
        )
        request.check_fits(info)
        requests.append(request)
    _check_prompt_logprobs(requests)
    deadlines.check()
    return Job(
        requests=requests,
        n=body.n or 1,
        stops=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        shown_tokens=parts.shown_tokens,
        deadline=deadlines.total,
    )


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


def _truncate(token_ids: list[int], limit: int | None, max_model_len: int) -> list[int]:
    """Keep the last `limit` tokens of a prompt; -1 keeps all that leave room for one more token."""
    if limit is None:
        return token_ids
    if limit < -1 or limit == 0:
        raise InvalidRequestError(
            "truncate_prompt_tokens must be -1 or at least 1", "truncate_prompt_tokens"
        )
    return token_ids[-(max_model_len - 1 if limit == -1 else limit) :]


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
