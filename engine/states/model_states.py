"""The layers with a state of one model: what does not go with them, and how they are prepared."""

from __future__ import annotations

from collections import abc

import torch
from torch import nn

from ..config import EngineConfig
from ..errors import ConfigurationError, UnsupportedModelError
from .layers import bind_layers, find_layers, prove_layers
from .state_spec import StateSpec
from .step_states import StateOps


def check_config(config: EngineConfig, architecture: str) -> None:
    """Raise ConfigurationError if the configuration asks for something that does not work with
    layers that keep a state."""
    asked = {
        "--speculative-model": config.speculative_model is not None,
        "--speculation ngram": config.speculation == "ngram",
    }
    for flag, is_asked in asked.items():
        if is_asked:
            raise ConfigurationError(
                f"{architecture}: its layers that keep a state cannot take a draft back: leave "
                f"{flag} out"
            )


def number_attention(body: nn.Module, kv_layers: abc.Sequence[int]) -> None:
    """Number the layers with K and V from 0, since the KV cache has no others. kv_layers are their
    places among all layers. Called once for a body."""
    numbers = {layer: number for number, layer in enumerate(kv_layers)}
    for module in body.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and layer in numbers:
            setattr(module, "layer_idx", numbers[layer])  # noqa: B010  (a module has no such type)


def bind_states(
    body: nn.Module,
    spec: StateSpec,
    ops: StateOps,
    hidden_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Let the layers that keep a state run over packed rows. hidden_size, device and dtype are
    those of their inputs.

    Raises UnsupportedModelError if they are not known, or do not compute the same.
    """
    layers = find_layers(body)
    if len(layers) != spec.num_layers:
        raise UnsupportedModelError(
            f"{len(layers)} of its {spec.num_layers} layers with a state are of a known kind"
        )
    bind_layers(layers.values(), ops)
    try:
        prove_layers(layers, spec, hidden_size, device, dtype)
    except (RuntimeError, TypeError, ValueError) as error:  # other shapes, or other arguments
        raise UnsupportedModelError(
            f"its layers that keep a state do not run over packed rows: {error}"
        ) from error
