"""Resolves a body's sampling parameters: the request's, else those of generation_config.json, else
the defaults in docs/api.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ...engine.config import EngineInfo
from ...engine.errors import ConfigurationError, ContextLengthError, InvalidRequestError
from ...engine.sampling_params import SamplingParams
from ..settings import Settings
from .protocol import GenerationBody

_FROM_CONFIG = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
"""Entries of a generation_config.json that are used."""
_TOP_K_OFF = (-1, 0)
_DRAWS_NOTHING = {"temperature": (0, 1), "top_p": (1,), "top_k": _TOP_K_OFF, "min_p": (0,)}
"""Parameters of random sampling, each with the values that a beam search accepts."""
COMPLETION_MAX_TOKENS = 16
"""Default max_tokens of a completion, as in OpenAI's API."""


def load_generation_defaults(source: str, model: str | None) -> dict[str, Any]:
    """Return the sampling parameters of a generation_config.json.

    `source` is "auto" (the model's own file, if there is one), "none", or a folder or file; `model`
    is a folder or hub id, or None if the model has no such files. Raises
    ConfigurationError if the file is missing, cannot be read, or has invalid values.
    """
    if source == "none" or (source == "auto" and model is None):
        return {}
    try:
        if source == "auto":
            found = cached_file(
                model, "generation_config.json", _raise_exceptions_for_missing_entries=False
            )
            if found is None:
                return {}  # many models have none
            path = Path(found)
        else:
            path = Path(source)
            path = path / "generation_config.json" if path.is_dir() else path
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"generation_config: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"generation_config: {source} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"generation_config: {source} is not a JSON object")
    defaults = {name: config[name] for name in _FROM_CONFIG if config.get(name) is not None}
    try:
        SamplingParams(
            max_tokens=defaults.get("max_new_tokens", 1),
            **{name: value for name, value in defaults.items() if name != "max_new_tokens"},
        )
    except (InvalidRequestError, TypeError) as error:
        raise ConfigurationError(f"generation_config: {error}") from error
    return defaults


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
    return width


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
) -> SamplingParams:
    """Return `params` with the max_tokens and min_tokens of one prompt.

    `asked` is the request's max_tokens and is never reduced. Without it, `default` is used, or the
    rest of the context if that is None, and reduced to what fits the context and the KV cache.
    Raises ContextLengthError, InvalidRequestError.
    """
    room = info.max_model_len - num_prompt_tokens
    if asked is None and room < 1:
        raise ContextLengthError(
            f"the prompt of {num_prompt_tokens} tokens fills the context of "
            f"{info.max_model_len} tokens",
            "prompt",
        )
    if asked is not None and asked > room:
        raise ContextLengthError(
            f"the prompt of {num_prompt_tokens} tokens and {param} of {asked} exceed the context "
            f"of {info.max_model_len} tokens",
            param if room > 0 else "prompt",
        )
    # The KV cache must hold all beams, which share the prompt's full blocks. The last token needs
    # no slot, since no step reads its keys and values.
    shared = num_prompt_tokens // info.block_size
    own = (info.num_blocks - shared) // (params.beam_width or 1)
    pool_room = max(1, (shared + own) * info.block_size - num_prompt_tokens + 1)
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
