"""How a model turns a text into scores: of its classes, or of a document's relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["softmax", "sigmoid", "identity"]
"""How logits become scores: together a distribution, each by itself a probability, or not at
all."""

NO_CLASSIFIER = (
    "it generates text. Models that score are …ForSequenceClassification, and rerankers whose "
    "folder has the LogitScore of sentence-transformers; --score-tokens names the tokens of others"
)
"""The usual reason why a model makes no scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierSpec:
    """How a model makes scores of the hidden state at a text's end.

    `labels` names its classes. A reranker has one, and compares the logits of two tokens, or takes
    that of one: `token_ids` are those of the answers yes and no; it is empty if the model has a
    head for its classes. `is_qwen3_reranker` says that pairs are written in the prompt that
    Qwen3-Reranker was trained with, unless the folder has a template for pairs.
    """

    labels: tuple[str, ...]
    activation: Activation
    token_ids: tuple[int, ...] = ()
    is_qwen3_reranker: bool = False
