from __future__ import annotations

import pytest

from quire.engine.layers.attention_shape import AttentionShape, attention_shapes
from quire.engine.layers.kv_lines import KVHeads, KVLines

WINDOW = 24
Shapes = set[tuple[int, int, int, int | None]]


@pytest.mark.parametrize(
    "num_heads,kinds,shapes",
    [
        (8, [(2, 64), (2, 64)], {(8, 2, 64, WINDOW), (8, 2, 64, None)}),
        # Gemma 4 26B: each windowed layer attends in two halves.
        (16, [(8, 256), (2, 512)], {(8, 4, 256, WINDOW), (16, 2, 512, None)}),
        # Gemma 4 E4B: each full layer does.
        (8, [(2, 256), (2, 512)], {(8, 2, 256, WINDOW), (4, 1, 512, None)}),
        # Gemma 4 E2B: heads of windowed layers are filled up.
        (8, [(1, 256), (1, 512)], {(8, 1, 512, WINDOW), (8, 1, 512, None)}),
    ],
)
def test_a_windowed_layer_and_a_full_one(
    num_heads: int, kinds: list[tuple[int, int]], shapes: Shapes
) -> None:
    heads = [KVHeads(*kind) for kind in kinds]
    lines = KVLines.of_layers(heads, (WINDOW, None), (0, 1))
    assert lines is not None
    found = attention_shapes(lines, num_heads, heads, (WINDOW, None))
    assert found == {AttentionShape(*shape) for shape in shapes}


def test_layers_that_are_alike_attend_in_one_shape() -> None:
    lines = KVLines.alike(KVHeads(1, 80), (None, None))
    found = attention_shapes(lines, 16, [KVHeads(1, 80)] * 2, (None, None), value_width=64)
    assert found == {AttentionShape(16, 1, 80, None, 64)}
