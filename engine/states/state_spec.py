"""Which layers of a model keep a state beside K and V, or in their place, and how large it is."""

from __future__ import annotations

from collections import abc
from typing import Any, NamedTuple

ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention", "hybrid"})
"""Types of layers with K and V, by transformers' names."""
STATE_TYPES = frozenset({"linear_attention", "conv", "hybrid"})
"""Types of layers with a state. A hybrid layer has both."""
LAYER_TYPES = ATTENTION_TYPES | STATE_TYPES | {"mlp", "moe"}
"""All types of layers that are served; mlp and moe are layers that mix no tokens."""

STATE_BYTES = 4
"""States are float32."""


class StateSpec(NamedTuple):
    """The state of one sequence in each of `num_layers` layers.

    The last `taps` inputs of a causal convolution over `channels` channels, and for each of `heads`
    heads a matrix `[key_dim, value_dim]`; there are 0 heads if the layers are nothing but
    convolutions.
    """

    num_layers: int
    channels: int
    taps: int
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of a sequence's state over all layers."""
        numbers = self.channels * self.taps + self.heads * self.key_dim * self.value_dim
        return STATE_BYTES * self.num_layers * numbers


def read_state(text: Any, layer_types: abc.Sequence[str]) -> StateSpec | None:
    """Return the state of a model from the configuration of its text part; None if no layer keeps
    one. Raises AttributeError if the configuration does not say how large it is."""
    number = sum(kind in STATE_TYPES for kind in layer_types)
    if number == 0:
        return None
    if "conv" in layer_types:
        return StateSpec(number, text.hidden_size, text.conv_L_cache - 1)
    if hasattr(text, "linear_num_value_heads"):  # the gated delta rule
        heads, key_dim = text.linear_num_value_heads, text.linear_key_head_dim
        value_dim = text.linear_value_head_dim
        keys = 2 * text.linear_num_key_heads * key_dim
        taps = text.linear_conv_kernel_dim - 1
    else:  # Mamba-2, whose families have two sets of names
        heads = _first(text, "mamba_n_heads", "mamba_num_heads")
        value_dim = _first(text, "mamba_d_head", "mamba_head_dim")
        key_dim = _first(text, "mamba_d_state", "ssm_state_size")
        keys = 2 * _first(text, "mamba_n_groups", "n_groups") * key_dim
        taps = _first(text, "mamba_d_conv", "conv_kernel") - 1
    return StateSpec(number, keys + heads * value_dim, taps, heads, key_dim, value_dim)


def _first(text: Any, name: str, other: str) -> int:
    """Return the attribute that a configuration has of two."""
    value: int = getattr(text, name) if hasattr(text, name) else getattr(text, other)
    return value
