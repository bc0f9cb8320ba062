"""The function that makes the logits of a model's classes from its hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..classifier_spec import ClassifierSpec
from ..config import EngineConfig
from ..errors import ConfigurationError, ModelLoadError
from .embedding_layout import read_json

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states `[R, hidden_size]` → logits of the vocabulary `[R, vocab_size]`."""
Scores = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states `[R, hidden_size]` → logits of the classes `[R, number of labels]`, float32."""


def make_scores(spec: ClassifierSpec, config: EngineConfig, logits: Logits) -> Scores:
    """Return the function that scores hidden states; `logits` is the model's own head.

    Raises ModelLoadError if the checkpoint has no weights for the classes.
    """
    if spec.token_ids:
        ids = torch.tensor(spec.token_ids)

        def compare(hidden: torch.Tensor) -> torch.Tensor:
            picked = logits(hidden)[:, ids.to(hidden.device)].float()
            return picked[:, :1] - picked[:, 1:] if len(ids) > 1 else picked

        return compare
    weight, bias = _read_head(config, len(spec.labels))

    def classify(hidden: torch.Tensor) -> torch.Tensor:
        at = (hidden.device, hidden.dtype)
        return F.linear(hidden, weight.to(*at), None if bias is None else bias.to(*at)).float()

    return classify


def _read_head(config: EngineConfig, num_labels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read `score.weight` `[num_labels, hidden_size]` and, if there is one, `score.bias`."""
    if config.load_format == "dummy":
        raise ConfigurationError("a model with random weights makes no scores")
    from safetensors import safe_open
    from transformers.utils import cached_file

    index = read_json(config.model, "model.safetensors.index.json") or {}
    file = index.get("weight_map", {}).get("score.weight", "model.safetensors")
    with safe_open(str(cached_file(config.model, file)), framework="pt") as tensors:
        names = set(tensors.keys())
        if "score.weight" not in names:
            raise ModelLoadError(f"{config.model!r} has no weights `score.weight` for its classes")
        weight: torch.Tensor = tensors.get_tensor("score.weight")
        bias = tensors.get_tensor("score.bias") if "score.bias" in names else None
    if len(weight) != num_labels:
        raise ModelLoadError(
            f"{config.model!r} has {num_labels} labels, but `score.weight` has {len(weight)} rows"
        )
    return weight, bias
