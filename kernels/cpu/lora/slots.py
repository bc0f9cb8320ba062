"""Slots: the weights of the adapters that run, packed into panels as products.py packs others.

A slot holds one adapter's A and B for one kind of product, of every layer. A product may have been
merged of several linear layers over one input (Q, K and V; gate and up). These are its parts: each
has an A and a B of its own, and its own columns of the output.

    A  [slots, layers, parts * rank_panels, in_features, PANEL_COLUMNS]    columns are ranks
    B  [slots, layers, out_panels, max_rank, PANEL_COLUMNS]                columns are outputs

Memory that was never written takes none, so slots that are not used, or not to their full rank,
cost little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..panels import PANEL_COLUMNS

Array = np.ndarray[Any, Any]
Weights = tuple[Array, Array]
"""A `[rank, in_features]` and B `[out_features, rank]`, float32."""


class Slots(NamedTuple):
    """The slots of one kind of product; see above."""

    a: Array
    b: Array
    ranks: Array
    """int64 `[slots, layers, parts]`; 0 if the adapter in a slot is not for a layer."""
    parts: Array
    """int64 `[parts, 4]`: first panel of B, number of panels, first column, number of columns."""

    @classmethod
    def allocate(
        cls, num_slots: int, num_layers: int, in_features: int, sizes: Sequence[int], max_rank: int
    ) -> Slots:
        """Allocate empty slots for products whose parts have `sizes` columns."""
        panels = [-(-size // PANEL_COLUMNS) for size in sizes]
        rank_panels = -(-max_rank // PANEL_COLUMNS)
        firsts, columns = np.cumsum(panels) - panels, np.cumsum(sizes) - sizes
        head = (num_slots, num_layers)
        return cls(
            np.zeros((*head, len(sizes) * rank_panels, in_features, PANEL_COLUMNS), np.float32),
            np.zeros((*head, sum(panels), max_rank, PANEL_COLUMNS), np.float32),
            np.zeros((*head, len(sizes)), np.int64),
            np.stack((firsts, panels, columns, sizes), axis=1).astype(np.int64),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that all slots take once they are filled."""
        return self.a.nbytes + self.b.nbytes

    def write(self, slot: int, layer: int, part: int, weights: Weights | None) -> None:
        """Put an adapter's weights of one part into a slot; None if it has none there."""
        if weights is None:
            self.ranks[slot, layer, part] = 0
            return
        a, b = weights
        rank = len(a)
        rank_panels = self.a.shape[2] // len(self.parts)
        for panel in range(-(-rank // PANEL_COLUMNS)):
            rows = a[panel * PANEL_COLUMNS : (panel + 1) * PANEL_COLUMNS]
            target = self.a[slot, layer, part * rank_panels + panel]
            target[:, : len(rows)] = rows.T
            target[:, len(rows) :] = 0
        first, count, _, _ = self.parts[part].tolist()
        for panel in range(count):
            rows = b[panel * PANEL_COLUMNS : (panel + 1) * PANEL_COLUMNS]
            target = self.b[slot, layer, first + panel, :rank]
            target[:, : len(rows)] = rows.T
            target[:, len(rows) :] = 0
        self.ranks[slot, layer, part] = rank
