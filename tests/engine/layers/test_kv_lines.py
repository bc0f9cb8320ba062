"""Test how layers with different heads share lines of the KV cache."""

from __future__ import annotations

import pytest

from quire.engine.layers.kv_lines import KVHeads, KVLines
from quire.engine.layers.layer_groups import LayerGroups


def lines(
    heads: list[tuple[int, int]], sources: list[int] | None = None
) -> tuple[tuple[int, int], tuple[tuple[int, ...], ...]] | None:
    """Return the heads of a line and the lines of each layer; layer i has a window of 10 + i."""
    found = KVLines.of_layers(
        [KVHeads(*one) for one in heads],
        [10 + layer for layer in range(len(heads))],
        sources or list(range(len(heads))),
    )
    if found is None:
        return None
    windows: dict[int, int | None] = dict(enumerate(found.windows))
    for layer, parts in enumerate(found.of_layer):
        source = (sources or range(len(heads)))[layer]
        assert {windows[part] for part in parts} == {10 + source}
    return tuple(found.heads), found.of_layer  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("heads", "wanted"),
    [
        ([(2, 16)] * 2, ((2, 16), ((0,), (1,)))),
        ([(8, 256), (2, 512)], ((2, 512), ((0, 1), (2,)))),  # Gemma 4 26B
        ([(2, 256), (2, 512)], ((2, 256), ((0,), (1, 2)))),  # Gemma 4 E4B
        ([(1, 256), (1, 512)], ((1, 512), ((0,), (1,)))),  # Gemma 4 E2B: the narrow one is padded
        ([(4, 64), (2, 128)], ((2, 128), ((0,), (1,)))),  # as many numbers in other heads
        ([(3, 64), (2, 64)], None),
        ([(1, 96), (2, 64)], None),
        ([(1, 64), (1, 96), (1, 128)], ((1, 128), ((0,), (1,), (2,)))),
    ],
)
def test_heads_are_cut_into_equal_lines(
    heads: list[tuple[int, int]], wanted: tuple[object, object] | None
) -> None:
    assert lines(heads) == wanted


def test_a_layer_has_the_lines_of_its_source() -> None:
    assert lines([(2, 8), (2, 16), (2, 8), (2, 16)], [0, 1, 0, 1]) == (
        (2, 8),
        ((0,), (1, 2), (0,), (1, 2)),
    )


def test_places_of_lines() -> None:
    """Layers whose lines are in one group, one after the other, need no table of places."""
    plain = KVLines.alike(KVHeads(2, 8), (None,) * 3)
    assert LayerGroups.one_table(3).places_of(plain.of_layer) is None
    assert LayerGroups.one_table(3).places_of(((0, 2), (1,))) == (((0, 0), (0, 2)), ((0, 1),))
    groups = LayerGroups.choose([None, 20, 20, 20], 1000, 16)
    assert groups.count_layers(((0,), (1, 2), (3,))) == (1, 1, 0, 1)
