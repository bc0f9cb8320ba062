"""From a validated body to a job for the engine: checks, admission, tokenising.

Both APIs go through the same steps, in an order that refuses a bad request as early and as cheaply
as possible: check the parameters (sampling.py), read the wanted structure (structured.py), claim a
place among the requests in flight (limits.py), tokenise the prompt (chat_prompt.py for chats),
compile the grammar on trial (structured.py, forced_calls.py), and build the job (job.py).
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest

from ...engine.errors import InvalidRequestError
from ...engine.reasoning import ReasoningSpec
from ...engine.sampling_params import SamplingParams
from ..http.limits import Ticket
from ..http.middleware import is_sane_request_id
from ..json_text import encode_json
from ..parsing.formats.message_format import prompt_end
from ..text.bad_words import encode_bad_words
from ..text.infill import encode_infill, infill_tokens
from ..text.tokenizer import Tokenizer
from .chat_prompt import check_chat, encode_chat, settings_without_effect
from .forced_calls import chat_grammar
from .job import Job, JobParts, make_job
from .protocol import ChatBody, CompletionBody, GenerationBody
from .sampling import COMPLETION_MAX_TOKENS, check_limits, resolve
from .state import ServerState
from .structured import read_constraint, try_out
from .tool_choice import offered_tools
from .unsupported import refuse_ignored


async def prepare_completion(state: ServerState, body: CompletionBody) -> tuple[Job, Ticket]:
    """Return the job of a completion and its place among the requests in flight.

    Raises QuireError, after giving the place back.
    """
    arrival = time.monotonic()
    info = state.engine.info
    # 1. Check the parameters.
    prompts = prompts_of(body.prompt, state.settings.max_prompts_per_request)
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
        params = _with_infill_ends(state.tokenizer, body, params)
    # 2. Claim a place. Text counts by its characters until it is tokenised.
    characters = sum(
        len(prompt) + len(body.suffix or "") for prompt in prompts if isinstance(prompt, str)
    )
    tokens = sum(len(prompt) for prompt in prompts if not isinstance(prompt, str))
    ticket = state.in_flight.admit(len(prompts) * width, characters, tokens)
    try:
        state.check_ready()
        # 3. Compile the grammar, tokenise, and build the job.
        grammar = await try_out(state, constraint)
        params = await _with_bad_words(state.tokenizer, body, params)
        token_ids = [
            await _encode_prompt(state, body, prompt) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        parts = JobParts(arrival=arrival, default_max_tokens=COMPLETION_MAX_TOKENS, grammar=grammar)
        job = make_job(state, body, params, token_ids, parts)
        ticket.tokenised(sum(len(request.prompt_token_ids) for request in job.requests))
    except BaseException:
        ticket.close()
        raise
    return job, ticket


async def prepare_chat(
    state: ServerState, body: ChatBody, *, caps_max_tokens: bool = False
) -> tuple[Job, Ticket]:
    """Return the job of a chat and its place among the requests in flight.

    With `caps_max_tokens`, a max_tokens beyond the room that is left is reduced. Raises QuireError,
    after giving the place back.
    """
    arrival = time.monotonic()
    info = state.engine.info
    # 1. Check the parameters.
    width = check_limits(body, 1, info, state.settings)
    params, max_tokens_param = _chat_params(state, body, width)
    check_chat(state, body)
    tools = offered_tools(body)
    structure = read_constraint(body)
    # 2. Claim a place. Text counts by its characters until it is tokenised.
    characters = sum(len(message.content or "") for message in body.messages)
    characters += len(encode_json(tools))
    predicted = body.prediction.text if body.prediction and info.speculates else ""
    characters += len(predicted)
    ticket = state.in_flight.admit(width, characters)
    try:
        state.check_ready()
        # 3. Tokenise, compile the grammar, and build the job. Whether a structured answer may begin
        #    with reasoning depends on the end of the prompt.
        params = await _with_bad_words(state.tokenizer, body, params)
        ignored = await _without_effect(state, body)
        prompt = await encode_chat(state, body, body.add_special_tokens, info.max_model_len)
        token_ids = prompt.token_ids
        constraint = chat_grammar(body, structure, token_ids, state.tokenizer, state.message_format)
        parts = JobParts(
            arrival=arrival,
            max_tokens_param=max_tokens_param,
            prompt_param="messages",
            caps_max_tokens=caps_max_tokens,
            grammar=await try_out(state, constraint),
            shown_tokens=state.message_format.control_tokens(with_tools=bool(tools)),
            call_openings=constraint.call_openings if constraint is not None else (),
            prediction=await _encode_prediction(state, predicted),
            reasoning=_reasoning(state, body, token_ids),
            ignored=[*ignored, *prompt.dropped],
        )
        job = make_job(state, body, params, [token_ids], parts)
        job = replace(job, prompt_changes=prompt.changes)
        ticket.tokenised(len(job.requests[0].prompt_token_ids))
    except BaseException:
        ticket.close()
        raise
    return job, ticket


async def _encode_prediction(state: ServerState, text: str) -> list[int]:
    """Return the tokens of a prediction, as far as the context reaches."""
    if not text:
        return []
    return await state.tokenizer.encode(
        text, add_special_tokens=False, keep=state.engine.info.max_model_len
    )


async def _without_effect(state: ServerState, body: ChatBody) -> list[str]:
    """Return the fields that have no effect with this model. Raises InvalidRequestError if the
    server is strict and there is one."""
    ignored = await settings_without_effect(state, body)
    if body.thinking_token_budget is not None and state.reasoning_marks is None:
        ignored.append("thinking_token_budget")
    if body.prediction is not None and not state.engine.info.speculates:
        ignored.append("prediction")
    if state.settings.strict:
        refuse_ignored(ignored)
    return ignored


def _reasoning(state: ServerState, body: ChatBody, prompt: list[int]) -> ReasoningSpec | None:
    """Return how the reasoning of a chat's answer is marked; None if it cannot have any."""
    if state.reasoning_marks is None:
        return None
    if body.thinking_token_budget is not None and not state.reasoning_marks.can_end:
        raise InvalidRequestError(
            "thinking_token_budget: the model's vocabulary cannot spell the end of its reasoning",
            "thinking_token_budget",
        )
    return state.reasoning_marks.spec(
        prompt_end(state.tokenizer, prompt),
        body.messages[-1].content if body.continue_final_message else None,
        budget=body.thinking_token_budget,
        with_tools=bool(offered_tools(body)),
    )


def _chat_params(state: ServerState, body: ChatBody, width: int) -> tuple[SamplingParams, str]:
    """Return a chat's sampling parameters, and the name of the field that holds its max_tokens.
    Raises InvalidRequestError."""
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    _check_max_tokens(getattr(body, name), name)
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
    params.check_vocabulary(state.engine.info.vocab_size)
    return params, name


def asked_by(job: Job, owner: bytes, user: str | None) -> Job:
    """Return the job, accounted to `user` of the API key whose digest is `owner`."""
    account = f"{owner.hex()[:16]}:{user or ''}"
    return replace(job, requests=[replace(each, user=account) for each in job.requests])


def response_id(prefix: str, request: HttpRequest, body: GenerationBody) -> str:
    """Return the id of an answer: `prefix-` and the request's id.

    A `request_id` in the body takes the place of the request's id, in the header too. Raises
    InvalidRequestError if it is not fit for a header.
    """
    if body.request_id is not None:
        if not is_sane_request_id(body.request_id):
            raise InvalidRequestError(
                "request_id may contain only letters, digits and . _ : -", "request_id"
            )
        request.state.request_id = body.request_id
    return f"{prefix}-{request.state.request_id}"


def prompts_of(prompt: Any, max_prompts: int) -> list[str] | list[list[int]]:
    """Return the prompts in a field of type `Prompt`, which holds one or several, as text or token
    ids. Raises InvalidRequestError."""
    if isinstance(prompt, str):
        prompts: Any = [prompt]
    elif prompt and isinstance(prompt[0], int):
        prompts = [prompt]
    else:
        prompts = prompt
    if not prompts or not all(prompts):
        raise InvalidRequestError("the prompt is empty", "prompt")
    if len(prompts) > max_prompts:
        raise InvalidRequestError(f"more than {max_prompts} prompts in one request", "prompt")
    return list(prompts)


async def _encode_prompt(state: ServerState, body: CompletionBody, prompt: str) -> list[int]:
    add_special = body.add_special_tokens is not False
    limit = state.engine.info.max_model_len
    if not body.suffix:
        return await state.tokenizer.encode(
            prompt, add_special_tokens=add_special, max_tokens=limit
        )
    return await encode_infill(
        state.tokenizer, prompt, body.suffix, add_special_tokens=add_special, max_tokens=limit
    )


def _with_infill_ends(
    tokenizer: Tokenizer, body: CompletionBody, params: SamplingParams
) -> SamplingParams:
    """Return `params` with the tokens that end the middle as stop tokens. Raises
    InvalidRequestError if `suffix` cannot be served."""
    ends = infill_tokens(tokenizer).ends
    if not isinstance(body.prompt, str) and not all(isinstance(item, str) for item in body.prompt):
        raise InvalidRequestError("suffix needs a prompt of text, not of token ids", "suffix")
    if body.echo:
        raise InvalidRequestError("suffix cannot be combined with echo", "suffix")
    if body.truncate_prompt_tokens is not None:
        raise InvalidRequestError("suffix cannot be combined with truncate_prompt_tokens", "suffix")
    if body.ignore_eos:
        return params
    return replace(params, stop_token_ids=(*params.stop_token_ids, *ends))


async def _with_bad_words(
    tokenizer: Tokenizer, body: GenerationBody, params: SamplingParams
) -> SamplingParams:
    if not body.bad_words:
        return params
    return replace(params, bad_words=await encode_bad_words(tokenizer, body.bad_words))


def _check_max_tokens(value: int | None, param: str, *, allow_zero: bool = False) -> None:
    if value is not None and value < (0 if allow_zero else 1):
        raise InvalidRequestError(f"{param} must be at least 1", param)


def _wanted_logprobs(asked: int | None, width: int, body: GenerationBody) -> int | None:
    """Return the number of log-probabilities to compute. best_of ranks its choices by that of the
    chosen tokens, so it needs them in any case."""
    if asked is None and width > (body.n or 1) and not body.use_beam_search:
        return 0
    return asked
