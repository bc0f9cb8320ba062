"""Test which layers share block tables, and how many blocks that takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.layers.layer_groups import (
    MAX_GROUPS,
    LayerGroups,
    blocks_needed,
    describe_window,
    first_needed,
    longest_that_fits,
)


def every(period: int, num_layers: int, window: int) -> list[int | None]:
    """Return windows of which each `period`-th is None."""
    return [None if layer % period == period - 1 else window for layer in range(num_layers)]


@pytest.mark.parametrize(
    ("windows", "context", "wanted"),
    [
        ([None] * 4, 4096, [(None, 4)]),
        ([4096] * 4, 4096, [(None, 4)]),  # a window over the whole context is none
        ([4096] * 4, 32768, [(4096, 4)]),
        (every(2, 24, 128), 131072, [(None, 12), (128, 12)]),  # gpt-oss 20b
        (every(6, 62, 1024), 32768, [(None, 10), *[(1024, n) for n in (8, 9, 9, 8, 9, 9)]]),
        (every(6, 26, 512), 32768, [(None, 4), *[(512, n) for n in (3, 4, 4, 3, 4, 4)]]),
        ([None, 64, 64, 16, 16], 1024, [(None, 1), (64, 1), (64, 1), (16, 1), (16, 1)]),
        ([None, *[64] * 47], 1024, [(None, 1), *[(64, 6)] * 2, (64, 7)]),
        (every(4, 48, -8192), 131072, [(None, 12), *[(-8192, 12)] * 3]),  # Llama 4 Scout
        ([-4096] * 4, 4096, [(None, 4)]),
        ([64, -64, None], 1024, [(None, 1), (-64, 1), (64, 1)]),
    ],
)
def test_groups_of_known_shapes(
    windows: list[int | None], context: int, wanted: list[tuple[int | None, int]]
) -> None:
    groups = LayerGroups.choose(windows, context, 16)
    if windows[1:] == [64] * 47:  # the layer without a window leaves places empty
        assert len(groups.groups) <= MAX_GROUPS and groups.groups[0] == (None, (0,))
        return
    assert [(group.window, len(group.layers)) for group in groups.groups] == wanted


kinds = st.sampled_from([None, 16, 40, 1000, -40, -64])


@given(st.lists(kinds, min_size=1, max_size=40), st.sampled_from([64, 500, 5000]))
def test_every_layer_has_one_place(windows: list[int | None], context: int) -> None:
    groups = LayerGroups.choose(windows, context, 16)
    places = groups.places()
    assert len(set(places)) == len(windows) and len(groups.groups) <= MAX_GROUPS
    assert max(place for _, place in places) < groups.num_places
    for layer, (number, place) in enumerate(places):
        group = groups.groups[number]
        assert group.layers[place] == layer
        window = windows[layer]
        assert group.window is None or group.window == window
    # The full layers come first, and a sequence takes no more memory than with one table.
    assert None not in groups.windows[1:]
    blocks = blocks_needed(groups.windows, 16, context)
    assert groups.num_places * blocks <= len(windows) * -(-context // 16)


def test_the_first_block_that_later_tokens_need() -> None:
    for size in (1, 4, 16):
        for window in (1, 5, 16, 33):
            for computed in range(100):
                oldest = max(computed - window + 1, 0)
                assert first_needed(window, computed, size) == oldest // size
                chunk = max(i for i in range(computed + 1) if i % window == 0)
                assert first_needed(-window, computed, size) == chunk // size


@given(
    st.lists(st.sampled_from([None, 1, 20, 64]), min_size=1, max_size=4),
    st.sampled_from([1, 16, 32]),
    st.integers(1, 300),
    st.integers(1, 4),
    st.integers(1, 100),
    st.integers(1, 200),
)
def test_the_longest_sequence_that_fits(
    windows: list[int | None],
    size: int,
    num_blocks: int,
    width: int,
    shared: int,
    step_tokens: int,
) -> None:
    fields = {"num_shared": shared, "width": width, "step_tokens": step_tokens}
    longest = longest_that_fits(windows, size, num_blocks, 1000, **fields)
    assert shared <= longest <= 1000
    if longest > shared:
        assert blocks_needed(windows, size, longest, **fields) <= num_blocks
    if longest < 1000:
        assert blocks_needed(windows, size, longest + 1, **fields) > num_blocks


def test_windows_are_described_for_people() -> None:
    described = [describe_window(window) for window in (None, 1024, -8192)]
    assert described == ["all tokens", "the last 1,024", "chunks of 8,192"]
