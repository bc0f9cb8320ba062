"""The protocol of a device's adapter slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from ..body.flat_decoder import FlatDecoder, FlatLayer, Mlp
from .adapter import Adapter, Place

if TYPE_CHECKING:
    from numpy.typing import NDArray


class LoraLimits(NamedTuple):
    """How much the slots of a device hold.

    There are `num_slots` of them, for ranks of at most `max_rank`; a step has at most `max_tokens`
    tokens.
    """

    num_slots: int
    max_rank: int
    max_tokens: int


class Adaptable(NamedTuple):
    """The linear layers of a body that can be adapted, by their names, which begin with `prefix`;
    and the same body flattened, if it runs so."""

    prefix: str
    places: Mapping[str, Place]
    flat: FlatDecoder | None


class FlatNames(NamedTuple):
    """The names of the layers of each product of a flat layer, in the order of its columns. Those
    of the MLP are empty if it is a mixture of experts."""

    qkv: tuple[str, ...]
    output: tuple[str, ...]
    gate_up: tuple[str, ...]
    down: tuple[str, ...]

    @classmethod
    def of_layer(cls, prefix: str, index: int, layer: FlatLayer) -> FlatNames:
        """Return the names in the layer with this index; flatten.py knows no others."""
        attention, mlp = (f"{prefix}.layers.{index}.{part}" for part in ("self_attn", "mlp"))
        qkv = ("qkv",) if layer.is_fused else tuple("qkv")
        gate_up: tuple[str, ...] = ()
        down: tuple[str, ...] = ()
        if isinstance(layer.mlp, Mlp):
            gate_up = ("gate_up",) if layer.mlp.is_fused else ("gate", "up")
            down = ("down",)
        return cls(
            tuple(f"{attention}.{part}_proj" for part in qkv),
            (f"{attention}.o_proj",),
            tuple(f"{mlp}.{part}_proj" for part in gate_up),
            tuple(f"{mlp}.{part}_proj" for part in down),
        )


class AdapterSlots(Protocol):
    """The weights of the adapters that run, on the device, and who uses them in a step."""

    @property
    def num_bytes(self) -> int:
        """Bytes that all slots take on the device once they are filled."""

    def write(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot, for the steps that are launched from now on."""

    def begin_step(self, token_slots: NDArray[np.int64] | None) -> None:
        """Take the slot of each token `[T]` of the step that is launched next, −1 for tokens
        without an adapter. None if no token has one; then the step runs as if there were no
        adapters."""
