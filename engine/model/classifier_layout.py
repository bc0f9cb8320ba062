"""Read from a model's folder how it makes scores.

There are three layouts:

config.json: …ForSequenceClassification    a linear layer `score` over the last hidden state
modules.json: Transformer → LogitScore     logits of one or two tokens (sentence-transformers)
Qwen3ForCausalLM, "reranker" in its name   logits of "yes" and "no" (arXiv 2506.05176)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints.gguf_tokenizer import tokenizer_folder
from ..checkpoints.source import source_of
from ..classifier_spec import NO_CLASSIFIER, Activation, ClassifierSpec
from ..config import EngineConfig
from ..errors import ConfigurationError, ModelLoadError
from .embedding_layout import read_json

_ACTIVATIONS: dict[str, Activation] = {"Identity": "identity", "Sigmoid": "sigmoid"}
"""By the class names of torch, which sentence-transformers writes with their modules."""


def read_classifier(hf_config: Any, config: EngineConfig) -> ClassifierSpec | str:
    """Return how the model makes scores, or the reason why it makes none.

    `config.score_tokens` takes precedence over the model's files. Raises ConfigurationError if they
    are not tokens, ModelLoadError if a file cannot be read.
    """
    architecture = (getattr(hf_config, "architectures", None) or [""])[0]
    name = Path(config.model).name.lower()
    is_qwen3 = architecture.startswith("Qwen3") and "reranker" in name
    try:
        # A GGUF file has no files beside it that say more.
        folder = source_of(config).repository
        activation = None if folder is None else _activation(folder)
        if config.score_tokens is not None:
            token_ids = _token_ids(config, config.score_tokens.split(","))
        elif architecture.endswith("ForSequenceClassification"):
            return _classes(hf_config, activation, is_qwen3)
        else:
            token_ids = () if folder is None else _logit_score(folder)
            if not token_ids and is_qwen3:
                token_ids = _token_ids(config, ["yes", "no"])
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelLoadError(f"cannot read how {config.model!r} makes scores: {error}") from error
    if not token_ids:
        return NO_CLASSIFIER
    return ClassifierSpec(
        labels=("relevance",),
        activation=activation or "sigmoid",
        token_ids=token_ids,
        is_qwen3_reranker=is_qwen3,
    )


def _classes(hf_config: Any, activation: Activation | None, is_qwen3: bool) -> ClassifierSpec:
    """Read the classes of a …ForSequenceClassification."""
    count: int = hf_config.num_labels
    names = hf_config.id2label or {}
    if activation is None:
        activation = "softmax" if count > 1 else "sigmoid"
        problem = getattr(hf_config, "problem_type", None)
        if problem == "regression":
            activation = "identity"
        elif problem == "multi_label_classification":
            activation = "sigmoid"
    return ClassifierSpec(
        labels=tuple(str(names.get(index, f"LABEL_{index}")) for index in range(count)),
        activation=activation,
        is_qwen3_reranker=is_qwen3,
    )


def _activation(model: str) -> Activation | None:
    """Return the activation that sentence-transformers wrote down, if it wrote one."""
    settings = read_json(model, "config_sentence_transformers.json") or {}
    config = read_json(model, "config.json") or {}
    nested = config.get("sentence_transformers") or {}
    written = (
        settings.get("activation_fn")
        or nested.get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
    )
    if written is None:
        return None
    name = str(written).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise ValueError(f"the activation {written} is not supported")
    return _ACTIVATIONS[name]


def _logit_score(model: str) -> tuple[int, ...]:
    """Return the tokens of a LogitScore module: that of yes, then that of no if it has one."""
    modules = read_json(model, "modules.json") or []
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds != ["Transformer", "LogitScore"]:
        return ()
    settings = read_json(model, f"{modules[1]['path']}/config.json") or {}
    ids = (settings["true_token_id"], settings.get("false_token_id"))
    return tuple(int(token_id) for token_id in ids if token_id is not None)


def _token_ids(config: EngineConfig, tokens: list[str]) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    if not 1 <= len(tokens) <= 2:
        raise ConfigurationError("--score-tokens takes one token, or two: of yes and of no")
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_folder(config.model, config.gguf_file), trust_remote_code=config.trust_remote_code
    )
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise ConfigurationError(f"{token!r} is not a token of {config.model!r}")
    return tuple(vocabulary[token] for token in tokens)
