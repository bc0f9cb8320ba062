"""Rotary factors of all positions, computed once: a step then looks its own up, in one launch.

The model's own module takes a dozen small launches for the factors of a step, in every step.
"""

from __future__ import annotations

import logging

import torch

from .flat_decoder import FlatDecoder, Rotation

logger = logging.getLogger("quire.engine")

MAX_BYTES = 1 << 28
"""Maximum size of a table. Longer contexts compute the factors of each step."""
_PIECE = 8192
"""Positions that are computed at a time."""


class RotaryTable:
    """Implements Rotations for the positions below a length."""

    def __init__(self, tables: dict[str | None, torch.Tensor]) -> None:
        self._tables = tables

    def __call__(self, positions: torch.Tensor, kind: str | None) -> Rotation:
        rows = self._tables[kind].index_select(0, positions)
        half = rows.shape[1] // 2
        return Rotation(rows[:, :half], rows[:, half:])


@torch.inference_mode()
def make_rotary_table(decoder: FlatDecoder, length: int) -> RotaryTable | None:
    """Compute the factors of the positions below `length` by the model's own rotary embedding, for
    each kind of layer; None if that takes more than MAX_BYTES.

    A position's factors may depend on nothing but the position, which the loader sees to.
    """
    weight = decoder.embedding.weight
    x = weight.new_empty(0)  # its type and device are what counts
    tables: dict[str | None, torch.Tensor] = {}
    num_bytes = 0
    for kind in decoder.rotary_kinds:
        first = decoder.rotation(x, torch.arange(1, device=weight.device), kind)
        width = first.cos.shape[1]
        num_bytes += 2 * length * width * first.cos.element_size()
        if num_bytes > MAX_BYTES:
            logger.info("rotary factors of %d positions are computed in each step", length)
            return None
        table = first.cos.new_empty(length, 2 * width)
        for begin in range(0, length, _PIECE):
            end = min(length, begin + _PIECE)
            positions = torch.arange(begin, end, device=weight.device)
            torch.cat(decoder.rotation(x, positions, kind), dim=1, out=table[begin:end])
        tables[kind] = table
    return RotaryTable(tables)
