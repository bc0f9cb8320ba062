"""The protocol of a checkpoint in a format of its own, and the table of those formats.

A folder of plain safetensors needs none of this: transformers loads it. A format is here if quire
reads its weights by itself, or if transformers must be told how to.
"""

from __future__ import annotations

from collections import abc
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..body.grouped_linear import GroupedWeight
from ..config import EngineConfig
from .gguf_checkpoint import GgufCheckpoint
from .quantized_checkpoint import QuantizedCheckpoint
from .quantized_config import quantization_of
from .source import source_of


class Checkpoint(Protocol):
    """One checkpoint: its configuration, its weights, and what is to be said of them."""

    @property
    def source_format(self) -> str:
        """The format for people to read, such as "GGUF Q4_1"."""

    @property
    def load_arguments(self) -> dict[str, Any] | None:
        """Arguments by which transformers' `from_pretrained` loads the weights, the model's name
        among them; None if `weights` reads them."""

    def hf_config(self) -> Any:
        """Return the transformers configuration. Raises ModelLoadError, UnsupportedModelError."""

    def weights(
        self, model: nn.Module, *, keep_groups: bool, keep_float8: bool, keep_rows: bool
    ) -> abc.Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
        """Yield the weight of each parameter of `model`, whose own are on the meta device, by its
        name. With `keep_groups`, weights of linear layers stay in their groups if they can; with
        `keep_float8`, those of float8 stay so too; with `keep_rows`, so may embeddings and the
        stacks of experts.

        A tied head that stays in groups comes under its own name. Raises ModelLoadError if weights
        are missing, left over, of another shape, or not finite.
        """

    def finish(self, model: nn.Module) -> None:
        """Change what the checkpoint has beside parameters, such as rotary frequencies, in a model
        that has its weights, whoever has read them. Raises ModelLoadError."""


class WeightFacts(NamedTuple):
    """What is told of a loaded model's weights: the checkpoint's format, how they are computed,
    their number (a tied one counts once) and the bytes that they take."""

    source_format: str
    computed_format: str
    num_parameters: int
    num_bytes: int


READERS: dict[str, abc.Callable[[EngineConfig], Checkpoint]] = {
    "gguf": GgufCheckpoint,
    "quantized": QuantizedCheckpoint,
}
"""The formats that are not plain safetensors, and what opens each."""


def format_of(config: EngineConfig) -> str | None:
    """Return the format of the configured model, a key of READERS; None is plain safetensors."""
    if source_of(config).gguf is not None:
        return "gguf"
    return None if quantization_of(config) is None else "quantized"


def open_checkpoint(config: EngineConfig) -> Checkpoint | None:
    """Open the configured model's checkpoint if it has a format of its own.

    Raises ModelLoadError or UnsupportedModelError before any memory is taken for weights.
    """
    name = format_of(config)
    return None if name is None else READERS[name](config)
