"""The proof that a flattened body computes what the model's own code computes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import inf, isnan
from typing import Any

import torch
from torch import nn

from ..body.flat_decoder import FlatDecoder, FlatLayer, Mixture, TorchOps
from ..body.flatten import flatten
from ..errors import one_line
from .model_spec import ModelSpec
from .probe import LayerCall, ProbeResult, difference_of, mix, probe_input

logger = logging.getLogger("quire.engine")


@torch.no_grad()
def flatten_if_equal(
    body: Any, spec: ModelSpec, expected: ProbeResult, run: Callable[[], ProbeResult]
) -> FlatDecoder | None:
    """Flatten a body. None if it cannot be, or if the flat one does not do what `expected` shows:
    call attention as the model's own code does, and return the same hidden states. `run` runs the
    body again, as `expected` was made."""
    # Roundings add up as a random walk does: 1.7% over 32 layers of bfloat16, 5% over 80.
    eps = torch.finfo(expected.hidden.dtype).eps
    tolerance = max(1e-4, 2 * eps * spec.num_layers**0.5)
    differences = []
    try:
        is_known = spec.layer_heads is None and spec.latents is None
        flat = flatten(body, spec.head_dim, spec.windows) if is_known else None
        if flat is None:
            return None
        played, expected = _play_back(flat, run, expected)
        # Nothing in a model's modules says whether they rotate halves or neighbours.
        for candidate in (flat, flat.with_pairs()):
            differences.append(_compare(candidate, played, spec, expected))
            if differences[-1] <= tolerance:
                return candidate
    except (RuntimeError, TypeError) as error:  # shapes or a rotary embedding of its own kind
        logger.info("the layers run through transformers' code: %s", one_line(error))
        return None
    logger.info(
        "the layers run through transformers' code: one function for all differs by %.1g",
        min(differences),
    )
    return None


class _PlayedBack(nn.Module):
    """Stands in for a mixture of experts: it returns what the mixture did, and keeps the relative
    difference of its input.

    A rounding may choose another expert, which is another result and no mistake. So that it does
    not look like one, the mixtures of a flat body, which are the model's own modules, are not run.
    """

    def __init__(self, input: torch.Tensor, output: Any) -> None:
        super().__init__()
        self._input, self._output = input, output
        self.difference = 0.0

    def forward(self, hidden: torch.Tensor) -> Any:
        self.difference = difference_of(hidden, self._input.view(hidden.shape))
        return self._output


Played = dict[nn.Module, _PlayedBack]


def _play_back(
    flat: FlatDecoder, run: Callable[[], ProbeResult], expected: ProbeResult
) -> tuple[Played, ProbeResult]:
    """Return what stands in for each mixture of a flat body, and the result that belongs to it: of
    another run if there are mixtures. Raises TypeError if one is called in a way of its own."""
    blocks = [layer.mlp.block for layer in flat.layers if isinstance(layer.mlp, Mixture)]
    if not blocks:
        return {}, expected
    calls: dict[nn.Module, tuple[Any, ...]] = {}

    def keep(block: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        calls[block] = (*inputs, output)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        expected = run()
    finally:
        for hook in hooks:
            hook.remove()
    if any(len(call) != 2 for call in calls.values()):
        raise TypeError("a mixture of experts has more than one input, or it has a name")
    return {block: _PlayedBack(*call) for block, call in calls.items()}, expected


def _compare(flat: FlatDecoder, played: Played, spec: ModelSpec, expected: ProbeResult) -> float:
    """Return the relative difference of a flat body's hidden states, or of the inputs of its
    mixtures; infinity if it calls attention otherwise, or if a number is none."""
    layers = [
        layer._replace(mlp=Mixture(played[layer.mlp.block]))
        if isinstance(layer.mlp, Mixture)
        else layer
        for layer in flat.layers
    ]
    calls: list[LayerCall] = []

    def attend(
        layer: FlatLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        shape = (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.head_dim)
        has_sinks = layer.sinks is not None
        options = (layer.window, layer.scale, layer.softcap)
        calls.append(
            LayerCall(layer.layer_idx, *shape, *options, has_sinks=has_sinks, obstacle=None)
        )
        return mix(query, key, value, layer.sinks)

    device = expected.hidden.device
    hidden = flat._replace(layers=layers)(*probe_input(spec, device), TorchOps(attend))
    differences = [difference_of(hidden, expected.hidden)]
    differences += [one.difference for one in played.values()]
    is_alike = calls == expected.calls and not any(map(isnan, differences))
    return max(differences) if is_alike else inf
