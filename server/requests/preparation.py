"""From a validated body to a job for the engine: admission, tokenising, limits, deadlines."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest

from ...engine.errors import InvalidRequestError, QueueTimeoutError, RequestTimeoutError
from ...engine.request import GrammarSpec, Pooling, Request
from ...engine.sampling_params import SamplingParams
from ..http.limits import Ticket
from ..http.middleware import is_sane_request_id
from ..json_text import encode_json
from ..text.bad_words import encode_bad_words
from ..text.infill import encode_infill, infill_tokens
from .chat_prompt import check_chat, encode_chat, offered_tools
from .forced_calls import forced_call
from .generation import Job
from .protocol import ChatBody, CompletionBody, GenerationBody
from .sampling import COMPLETION_MAX_TOKENS, check_limits, resolve, with_max_tokens
from .state import ServerState
from .structured import read_constraint, try_out

MAX_PROMPT_LOGPROBS = 1_000_000
"""Most entries (prompt tokens × (k + 1)) of prompt log-probabilities in one answer."""


async def prepare_completion(state: ServerState, body: CompletionBody) -> tuple[Job, Ticket]:
    """Raises QuireError; the ticket is given back then."""
    arrival = time.monotonic()
    prompts = prompts_of(body.prompt, state)
    info = state.engine.info
    width = check_limits(body, len(prompts), info, state.settings)
    echoed = body.logprobs if body.echo else None
    _check_max_tokens(body.max_tokens, "max_tokens", allow_zero=bool(body.echo))
    params = resolve(
        body,
        state.generation_defaults,
        width=width,
        logprobs=_wanted_logprobs(body.logprobs, width, body),
        prompt_logprobs=body.prompt_logprobs if body.prompt_logprobs is not None else echoed,
    )
    params.check_vocabulary(info.vocab_size)
    constraint = read_constraint(body)
    if body.suffix:
        params = _with_infill_ends(state, body, params)
    characters = sum(
        len(prompt) + len(body.suffix or "") for prompt in prompts if isinstance(prompt, str)
    )
    tokens = sum(len(prompt) for prompt in prompts if not isinstance(prompt, str))
    ticket = state.in_flight.admit(len(prompts) * width, characters, tokens)
    try:
        state.check_ready()
        grammar = await try_out(state, constraint)
        params = await _with_bad_words(state, body, params)
        token_ids = [
            await _encode_prompt(state, body, prompt) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        job = make_job(
            state, body, params, token_ids, arrival, "max_tokens", COMPLETION_MAX_TOKENS, grammar
        )
        ticket.tokenised(sum(len(request.prompt_token_ids) for request in job.requests))
    except BaseException:
        ticket.close()
        raise
    return job, ticket


async def prepare_chat(state: ServerState, body: ChatBody) -> tuple[Job, Ticket]:
    """Raises QuireError; the ticket is given back then."""
    arrival = time.monotonic()
    info = state.engine.info
    width = check_limits(body, 1, info, state.settings)
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = body.max_tokens if param == "max_tokens" else body.max_completion_tokens
    _check_max_tokens(max_tokens, param)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs", "top_logprobs")
    wanted = (body.top_logprobs or 0) if body.logprobs else None
    params = resolve(
        body,
        state.generation_defaults,
        width=width,
        logprobs=_wanted_logprobs(wanted, width, body),
        prompt_logprobs=body.prompt_logprobs,
    )
    params.check_vocabulary(info.vocab_size)
    check_chat(state, body)
    tools = offered_tools(body)
    constraint = read_constraint(body)
    if constraint is not None and tools:
        raise InvalidRequestError(
            f"{constraint.param}: an answer that must have a structure cannot call tools",
            constraint.param,
        )
    characters = sum(len(message.content or "") for message in body.messages)
    characters += len(encode_json(tools))
    ticket = state.in_flight.admit(width, characters)
    try:
        state.check_ready()
        params = await _with_bad_words(state, body, params)
        token_ids = await encode_chat(state, body, body.add_special_tokens, info.max_model_len)
        grammar = await try_out(state, constraint or forced_call(state, body, token_ids))
        fields = body if max_tokens is None else body.model_copy(update={"max_tokens": max_tokens})
        job = make_job(state, fields, params, [token_ids], arrival, param, None, grammar)
        shown = state.message_format.control_tokens(with_tools=bool(tools))
        job = replace(job, shown_tokens=shown)
        ticket.tokenised(len(job.requests[0].prompt_token_ids))
    except BaseException:
        ticket.close()
        raise
    return job, ticket


def asked_by(job: Job, owner: bytes, user: str | None) -> Job:
    """The job, counted for `user` of the API key's `owner`."""
    account = f"{owner.hex()[:16]}:{user or ''}"
    return replace(job, requests=[replace(each, user=account) for each in job.requests])


def response_id(prefix: str, request: HttpRequest, body: GenerationBody) -> str:
    """`prefix-` and the request's id; one from the body wins and is echoed in the header too.

    Raises InvalidRequestError where the body's cannot stand in a header.
    """
    if body.request_id is not None:
        if not is_sane_request_id(body.request_id):
            raise InvalidRequestError(
                "request_id may have letters, digits and . _ : - only", "request_id"
            )
        request.state.request_id = body.request_id
    return f"{prefix}-{request.state.request_id}"


def prompts_of(prompt: Any, state: ServerState) -> list[str] | list[list[int]]:
    """The prompts of a `prompt` of either kind, one or several. Raises InvalidRequestError."""
    if isinstance(prompt, str):
        prompts: Any = [prompt]
    elif prompt and isinstance(prompt[0], int):
        prompts = [prompt]
    else:
        prompts = prompt
    most = state.settings.max_prompts_per_request
    if not prompts or not all(prompts):
        raise InvalidRequestError("the prompt is empty", "prompt")
    if len(prompts) > most:
        raise InvalidRequestError(f"more than {most} prompts in one request", "prompt")
    return list(prompts)


async def _encode_prompt(state: ServerState, body: CompletionBody, prompt: str) -> list[int]:
    add_special = body.add_special_tokens is not False
    most = state.engine.info.max_model_len
    if not body.suffix:
        return await state.tokenizer.encode(prompt, add_special_tokens=add_special, max_tokens=most)
    return await encode_infill(
        state.tokenizer, prompt, body.suffix, add_special_tokens=add_special, max_tokens=most
    )


def _with_infill_ends(
    state: ServerState, body: CompletionBody, params: SamplingParams
) -> SamplingParams:
    """`params`, which stop where the middle is complete. Raises InvalidRequestError where `suffix`
    cannot be served."""
    ends = infill_tokens(state.tokenizer).ends
    if not isinstance(body.prompt, str) and not all(isinstance(item, str) for item in body.prompt):
        raise InvalidRequestError("suffix needs a prompt of text, not of token ids", "suffix")
    if body.echo:
        raise InvalidRequestError("suffix and echo exclude each other", "suffix")
    if body.truncate_prompt_tokens is not None:
        raise InvalidRequestError("suffix and truncate_prompt_tokens exclude each other", "suffix")
    if body.ignore_eos:
        return params
    return replace(params, stop_token_ids=(*params.stop_token_ids, *ends))


async def _with_bad_words(
    state: ServerState, body: GenerationBody, params: SamplingParams
) -> SamplingParams:
    if not body.bad_words:
        return params
    return replace(params, bad_words=await encode_bad_words(state.tokenizer, body.bad_words))


def _check_max_tokens(value: int | None, param: str, *, allow_zero: bool = False) -> None:
    if value is not None and value < (0 if allow_zero else 1):
        raise InvalidRequestError(f"{param} must be at least 1", param)


def _wanted_logprobs(asked: int | None, width: int, body: GenerationBody) -> int | None:
    """best_of ranks by log-probability, so it needs that of the chosen tokens in any case."""
    if asked is None and width > (body.n or 1) and not body.use_beam_search:
        return 0
    return asked


def _truncate(token_ids: list[int], limit: int | None, max_model_len: int) -> list[int]:
    if limit is None:
        return token_ids
    if limit < -1 or limit == 0:
        raise InvalidRequestError(
            "truncate_prompt_tokens must be -1 or at least 1", "truncate_prompt_tokens"
        )
    return token_ids[-(max_model_len - 1 if limit == -1 else limit) :]


def make_job(
    state: ServerState,
    body: GenerationBody,
    params: SamplingParams,
    prompts: Sequence[list[int]],
    arrival: float,
    max_tokens_param: str,
    default_max_tokens: int | None,
    grammar: GrammarSpec | None,
    pooling: Pooling | None = None,
) -> Job:
    """A request for each of `prompts`, known to fit. Raises QuireError."""
    settings, info = state.settings, state.engine.info
    seconds = [limit for limit in (settings.request_timeout, body.timeout) if limit is not None]
    deadline = arrival + min(seconds) if seconds else None
    queue_deadline = deadline
    if settings.queue_timeout is not None:
        queue_deadline = min(arrival + settings.queue_timeout, deadline or float("inf"))
    default = state.generation_defaults.get("max_new_tokens", default_max_tokens)
    requests = []
    for prompt in prompts:
        token_ids = _truncate(prompt, body.truncate_prompt_tokens, info.max_model_len)
        request = Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=tuple(token_ids),
            sampling_params=with_max_tokens(
                params,
                body.max_tokens,
                default,
                min_tokens=body.min_tokens or 0,
                num_prompt_tokens=len(token_ids),
                info=info,
                param=max_tokens_param,
            ),
            arrival_time=arrival,
            queue_deadline=queue_deadline,
            deadline=deadline,
            priority=body.priority or 0,
            cache_salt=body.cache_salt,
            grammar=grammar,
            pooling=pooling,
        )
        request.check_fits(
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            block_size=info.block_size,
            num_blocks=info.num_blocks,
            can_generate=info.can_generate,
        )
        requests.append(request)
    _check_prompt_logprobs(requests)
    now = time.monotonic()
    if deadline is not None and now >= deadline:
        raise RequestTimeoutError("the request took longer than its timeout")
    if queue_deadline is not None and now >= queue_deadline:
        raise QueueTimeoutError("the request waited longer than the queue timeout")
    return Job(
        requests=requests,
        n=body.n or 1,
        stops=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        shown_tokens=(),
        deadline=deadline,
    )


def _check_prompt_logprobs(requests: Sequence[Request]) -> None:
    k = requests[0].sampling_params.prompt_logprobs
    if k is None:
        return
    entries = sum(len(request.prompt_token_ids) for request in requests) * (k + 1)
    if entries > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"log-probabilities of {entries} prompt tokens and alternatives are more than "
            f"{MAX_PROMPT_LOGPROBS}",
            "prompt_logprobs",
        )
