"""Loads the small model that drafts tokens for the served one, if it fits that one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from ..checkpoints.gguf_tokenizer import tokenizer_folder
from ..config import EngineConfig
from ..devices.backend import Backend
from ..errors import ConfigurationError, StartupError
from ..model.causal_lm import CausalLM
from ..model.loader import load_model
from ..model.model_spec import ModelSpec

logger = logging.getLogger("quire.engine")

SAME_TOKENS = 0.9
"""Minimum share of ids that must be the same token in both vocabularies. Some may differ: models of
one family name their special tokens differently."""


def draft_config(config: EngineConfig) -> EngineConfig:
    """Return the configuration with which the draft model is loaded: the model's own, without what
    belongs to the served model."""
    assert config.speculative_model is not None
    return replace(
        config,
        model=config.speculative_model,
        gguf_file=None,
        max_model_len=None,
        score_tokens=None,
        pooling="auto",
        enable_lora=False,
        lora=(),
        speculation="off",
        speculative_model=None,
    )


def load_draft(
    config: EngineConfig, spec: ModelSpec, max_model_len: int, backend: Backend
) -> CausalLM:
    """Load the draft model of a served model with this `spec` and context.

    Raises StartupError, naming the flag, if it cannot be loaded, has another vocabulary or other
    end tokens, or a shorter context.
    """
    own = draft_config(config)
    try:
        vocabularies = _vocabulary(config), _vocabulary(own)
        _compare_tokenizers(*vocabularies)
        model = load_model(own, backend)
        if None in vocabularies:
            _compare_sizes(spec.vocab_size, model.spec.vocab_size)
        _check_spec(model.spec, spec, max_model_len)
    except StartupError as error:
        raise type(error)(f"--speculative-model {own.model}: {error.message}") from error
    logger.info("%s drafts tokens", own.model)
    return model


def _vocabulary(config: EngineConfig) -> Mapping[str, int] | None:
    """Return the ids of a model's tokens; None if it has no tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_folder(config.model, config.gguf_file),
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError):
        return None
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _compare_tokenizers(served: Mapping[str, int] | None, draft: Mapping[str, int] | None) -> None:
    if served is None or draft is None:
        return  # the widths of the models' logits are compared
    _compare_sizes(len(served), len(draft))
    same = sum(draft.get(token) == index for token, index in served.items())
    if same < SAME_TOKENS * len(served):
        raise ConfigurationError(
            f"its vocabulary is another one: {same} of {len(served)} tokens are the model's"
        )


def _compare_sizes(served: int, draft: int) -> None:
    if served != draft:
        raise ConfigurationError(f"its vocabulary has {draft} tokens and the model's has {served}")


def _check_spec(draft: ModelSpec, served: ModelSpec, max_model_len: int) -> None:
    if set(draft.eos_token_ids) != set(served.eos_token_ids):
        raise ConfigurationError(
            f"its end tokens are {sorted(draft.eos_token_ids)} and the model's are "
            f"{sorted(served.eos_token_ids)}"
        )
    if draft.max_position < max_model_len:
        raise ConfigurationError(
            f"its context has {draft.max_position} tokens and the model's has {max_model_len}: "
            f"set --max-model-len {draft.max_position} or less"
        )
