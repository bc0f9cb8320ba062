"""The shapes in which the layers of a model attend, which a device's kernels are prepared for."""

from __future__ import annotations

from collections import abc
from typing import NamedTuple

from .kv_lines import KVHeads, KVLines


class AttentionShape(NamedTuple):
    """How one layer attends, or one part of it if its heads are cut into several lines."""

    num_heads: int
    """Heads of Q."""
    num_kv_heads: int
    head_dim: int
    window: int | None
    """As that of a layer."""
    value_width: int | None = None
    """The numbers of a key that are its value, if the cache is of latents."""

    @property
    def group(self) -> int:
        """The heads of Q that attend to one head of K."""
        return self.num_heads // self.num_kv_heads


def attention_shapes(
    lines: KVLines,
    num_heads: int,
    heads: abc.Sequence[KVHeads],
    windows: abc.Sequence[int | None],
    value_width: int | None = None,
) -> frozenset[AttentionShape]:
    """Return the shapes of layers that have `num_heads` heads of Q each, these heads of K and V,
    these windows, and latents with a `value_width` if that is given. Layers whose heads are
    narrower than those of a line fill them up."""
    shapes = set()
    for of_layer, (num_kv_heads, head_dim), window in zip(
        lines.of_layer, heads, windows, strict=True
    ):
        parts = len(of_layer)
        part = KVHeads(num_kv_heads // parts, head_dim)
        if part.size != lines.heads.size:
            part = lines.heads
        shapes.add(AttentionShape(num_heads // parts, *part, window, value_width))
    return frozenset(shapes)
