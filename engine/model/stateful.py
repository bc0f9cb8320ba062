"""Models of which some layers keep a state, in the place of K and V or beside them."""

from __future__ import annotations

import logging
from typing import Any

from ..config import EngineConfig
from ..errors import ConfigurationError, UnsupportedModelError
from ..states.layers import bind_layers, find_layers, prove_layers
from ..states.step_states import StateOps
from .model_spec import ModelSpec
from .probe import refuse
from .text_part import text_body

logger = logging.getLogger("quire.engine")


def check_stateful(config: EngineConfig, spec: ModelSpec) -> None:
    """Raise ConfigurationError if the configuration asks for something that does not work with
    layers that keep a state, and the model has such layers."""
    if spec.state is None:
        return
    reasons = {
        "--tensor-parallel-size": (config.tensor_parallel_size > 1, "run on one device"),
        "--pipeline-parallel-size": (config.pipeline_parallel_size > 1, "run on one device"),
        "--speculative-model": (
            config.speculative_model is not None,
            "cannot take a draft back",
        ),
        "--speculation ngram": (config.speculation == "ngram", "cannot take a draft back"),
    }
    for flag, (is_asked, reason) in reasons.items():
        if is_asked:
            raise ConfigurationError(
                f"{spec.architecture}: its layers that keep a state {reason}: leave {flag} out"
            )


def number_attention(model: Any, spec: ModelSpec) -> None:
    """Number the layers with K and V from 0, since the KV cache has no others. Called once."""
    numbers = {layer: number for number, layer in enumerate(spec.kv_layers)}
    for module in text_body(model).modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and layer in numbers:
            module.layer_idx = numbers[layer]


def bind_states(model: Any, spec: ModelSpec, ops: StateOps) -> None:
    """Let the layers that keep a state run over packed rows.

    Raises UnsupportedModelError if they are not known, or do not compute the same.
    """
    assert spec.state is not None
    body = text_body(model)
    layers = find_layers(body)
    if len(layers) != spec.state.num_layers:
        refuse(
            spec,
            f"{len(layers)} of its {spec.state.num_layers} layers with a state are of a known kind",
        )
    bind_layers(layers.values(), ops)
    hidden_size, size = body.config.hidden_size, spec.state.num_bytes
    try:
        prove_layers(layers, spec.state, hidden_size, model.device, model.dtype)
    except UnsupportedModelError as error:
        refuse(spec, error.message, error)
    except (RuntimeError, TypeError, ValueError) as error:  # other shapes, or other arguments
        refuse(spec, f"its layers that keep a state do not run over packed rows: {error}", error)
    logger.info("%d layers keep a state: %.1f MB a sequence", len(layers), size / 1e6)
