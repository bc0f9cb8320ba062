"""Resolves a body's sampling parameters: the request's, else those of generation_config.json
(server/serving/generation_defaults.py), else the defaults in docs/api.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...engine.config import EngineInfo
from ...engine.errors import ContextLengthError, InvalidRequestError
from ...engine.layers.layer_groups import longest_that_fits
from ...engine.sampling_params import SamplingParams
from ..settings import Settings
from .protocol import GenerationBody

_TOP_K_OFF = (-1, 0)
_DRAWS_NOTHING = {"temperature": (0, 1), "top_p": (1,), "top_k": _TOP_K_OFF, "min_p": (0,)}
"""Parameters of random sampling, each with the values that a beam search accepts."""
COMPLETION_MAX_TOKENS = 16
"""Default max_tokens of a completion, as in OpenAI's API."""


def check_limits(
    body: GenerationBody, num_prompts: int, info: EngineInfo, settings: Settings
) -> int:
    """Check how a body's parameters fit together and fit the server's limits.

    Returns the number of sequences for each prompt: best_of, by default n. Raises
    InvalidRequestError naming the parameter.
    """
    # 1. The number of sequences, of a prompt and in all.
    n = 1 if body.n is None else body.n
    width = n if body.best_of is None else body.best_of
    max_width = min(settings.max_n, info.max_num_seqs)
    for name, value in (("n", n), ("best_of", width)):
        if not 1 <= value <= max_width:
            raise InvalidRequestError(f"{name} must be from 1 to {max_width}", name)
    if width < n:
        raise InvalidRequestError("best_of must be at least n", "best_of")
    max_sequences = max(settings.max_n, settings.max_prompts_per_request)
    if width * num_prompts > max_sequences:
        raise InvalidRequestError(
            f"{num_prompts} prompts with {width} choices exceed the maximum of {max_sequences} "
            "sequences",
            "n",
        )
    # 2. Beam search, and parameters that only it has.
    if body.use_beam_search:
        _check_beam_search(body)
    elif body.length_penalty not in (None, 1.0):
        raise InvalidRequestError("length_penalty needs use_beam_search", "length_penalty")
    elif body.early_stopping:
        raise InvalidRequestError("early_stopping needs use_beam_search", "early_stopping")
    # 3. Streaming.
    if body.stream:
        if width > n:
            raise InvalidRequestError("best_of above n cannot be streamed", "best_of")
        if body.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs cannot be streamed", "prompt_logprobs")
    elif body.stream_options is not None:
        raise InvalidRequestError("stream_options needs stream", "stream_options")
    # 4. The number of log-probabilities.
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        count = getattr(body, name, None)
        if type(count) is int and not 0 <= count <= info.max_logprobs:
            raise InvalidRequestError(f"{name} must be from 0 to {info.max_logprobs}", name)
    _check_named_tokens(body)
    return width


def _check_named_tokens(body: GenerationBody) -> None:
    if body.logprob_token_ids is None:
        return
    if not body.logprob_token_ids:
        raise InvalidRequestError("logprob_token_ids must not be empty", "logprob_token_ids")
    wanted = getattr(body, "logprobs", None)
    if wanted is None or wanted is False:
        raise InvalidRequestError("logprob_token_ids needs logprobs", "logprob_token_ids")


def _check_beam_search(body: GenerationBody) -> None:
    """Raise InvalidRequestError for parameters that a beam search could not follow. Other
    parameters that shape the logits are refused by SamplingParams."""
    if body.stream:
        raise InvalidRequestError("a beam search cannot be streamed", "use_beam_search")
    if body.stop:
        raise InvalidRequestError(
            "beam search does not support stop strings; use stop_token_ids", "stop"
        )
    for name, harmless in _DRAWS_NOTHING.items():
        value = getattr(body, name)
        if value is not None and value not in harmless:
            raise InvalidRequestError(
                f"{name} cannot be used with beam search, which does not draw at random", name
            )


def resolve(
    body: GenerationBody,
    defaults: dict[str, Any],
    *,
    width: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Return all sampling parameters except max_tokens and bad_words, which depend on the prompt
    and the tokenizer. max_tokens is 1 until `with_max_tokens` sets it.

    `defaults` are the model's; a beam search does not use them, since it does not draw at random.
    Raises InvalidRequestError naming the parameter.
    """
    searching = bool(body.use_beam_search)
    defaults = {} if searching else defaults

    def pick(name: str, default: Any) -> Any:
        value = getattr(body, name)
        return defaults.get(name, default) if value is None else value

    top_k = pick("top_k", 0)
    return SamplingParams(
        max_tokens=1,
        n=body.n or 1 if searching else width,
        temperature=0.0 if searching else float(pick("temperature", 1.0)),
        top_p=float(pick("top_p", 1.0)),
        top_k=0 if top_k in _TOP_K_OFF else top_k,
        min_p=float(pick("min_p", 0.0)),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=float(pick("repetition_penalty", 1.0)),
        logit_bias=_logit_bias(body.logit_bias or {}),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        logprob_token_ids=tuple(body.logprob_token_ids or ()),
        prompt_logprobs=prompt_logprobs,
        beam_width=width if searching else None,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        early_stopping=body.early_stopping or False,
    )


def with_max_tokens(
    params: SamplingParams,
    asked: int | None,
    default: int | None,
    *,
    min_tokens: int,
    num_prompt_tokens: int,
    info: EngineInfo,
    param: str = "max_tokens",
    prompt_param: str = "prompt",
    caps: bool = False,
) -> SamplingParams:
    """Return `params` with the max_tokens and min_tokens of one prompt.

    `asked` is the request's max_tokens, which is reduced only if `caps` allows it. Without it,
    `default` is used, or the rest of the context if that is None, and reduced to what fits the
    context and the KV cache. `param` and `prompt_param` are the fields that errors name. Raises
    ContextLengthError, InvalidRequestError.
    """
    room = info.max_model_len - num_prompt_tokens
    if room < min(1 if asked is None else asked, 1):
        raise ContextLengthError.of_prompt(num_prompt_tokens, info.max_model_len, prompt_param)
    if caps and asked is not None:
        asked, default = None, asked
    if asked is not None and asked > room:
        raise ContextLengthError(
            f"This model's maximum context length is {info.max_model_len} tokens, but {param} asks "
            f"for {asked} tokens after a prompt of {num_prompt_tokens}. Shorten the prompt or "
            f"lower {param}.",
            param,
        )
    # The KV cache must hold all beams, which share the prompt's full blocks. The last token needs
    # no slot, since no step reads its keys and values.
    longest = longest_that_fits(
        info.group_windows,
        info.block_size,
        info.num_blocks,
        info.max_model_len,
        num_shared=num_prompt_tokens,
        width=params.beam_width or 1,
        step_tokens=info.step_tokens,
    )
    pool_room = max(1, longest - num_prompt_tokens + 1)
    limit = min(room, pool_room, room if default is None else default)
    return replace(params, max_tokens=limit if asked is None else asked, min_tokens=min_tokens)


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """Return (token id, bias) pairs from a JSON object. Raises InvalidRequestError."""
    entries = []
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise InvalidRequestError(f"logit_bias: {key[:32]!r} is not a token id", "logit_bias")
        entries.append((int(key), value))
    return tuple(entries)
