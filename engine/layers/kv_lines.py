"""How K and V of layers with different heads lie in blocks that are all alike.

The KV cache consists of *lines*: each has, in every block, K and V of the same number of heads and
dimensions. In most models each layer has a line of its own. In others (Gemma 4)

- layers have more heads or wider ones than others: those are cut into parts by their heads, and
  each part has a line, in which its numbers lie as if they were those of a line's heads;
- the last layers attend to K and V of an earlier one: they have its line.

    Gemma 4 26B   25 windowed layers   8 heads × 256 = 2 lines of 1,024 numbers each
                   5 full layers       2 heads × 512 = 1 line
"""

from __future__ import annotations

from collections import abc
from typing import NamedTuple


class KVHeads(NamedTuple):
    """The heads of one layer's K and V, or of a line's."""

    num_heads: int
    head_dim: int

    @property
    def size(self) -> int:
        """The numbers of K, or of V, of one token."""
        return self.num_heads * self.head_dim


class KVLines(NamedTuple):
    """The lines of a KV cache."""

    heads: KVHeads
    """Of every line."""
    windows: tuple[int | None, ...]
    """The window of each line, as of a layer's."""
    of_layer: tuple[tuple[int, ...], ...]
    """For each layer the lines of its heads' parts, which are equal."""

    @classmethod
    def alike(cls, heads: KVHeads, windows: tuple[int | None, ...]) -> KVLines:
        """Return the lines of layers that have one each."""
        return cls(heads, windows, tuple((layer,) for layer in range(len(windows))))

    @classmethod
    def of_layers(
        cls,
        heads: abc.Sequence[KVHeads],
        windows: abc.Sequence[int | None],
        sources: abc.Sequence[int],
    ) -> KVLines | None:
        """Return the lines of layers with these heads and windows. Layer i attends to K and V of
        layer sources[i], which is itself for most. None if such layers cannot share blocks."""
        line = _choose_line([heads[layer] for layer in sorted(set(sources))])
        if line is None:
            return None
        line_windows: list[int | None] = []
        of_layer: list[tuple[int, ...]] = []
        for layer, source in enumerate(sources):
            if source == layer:
                first, count = len(line_windows), _count(heads[layer], line)
                line_windows += [windows[layer]] * count
                of_layer.append(tuple(range(first, first + count)))
            else:
                of_layer.append(of_layer[source])
        return cls(line, tuple(line_windows), tuple(of_layer))


def _choose_line(kinds: abc.Sequence[KVHeads]) -> KVHeads | None:
    """Return the heads of a line: those of the fewest numbers if all others can be cut into them,
    otherwise the widest heads, to which others are filled up with zeros. None if neither works."""
    by_size = sorted(set(kinds), key=lambda kind: (kind.size, kind))
    line, widest = by_size[0], by_size[-1]
    if all(
        kind.size % line.size == 0 and kind.num_heads % (kind.size // line.size) == 0
        for kind in by_size
    ):
        return line
    if all(kind.num_heads == widest.num_heads for kind in by_size):
        return widest
    return None


def _count(heads: KVHeads, line: KVHeads) -> int:
    return max(1, heads.size // line.size)
