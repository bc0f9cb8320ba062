"""Groups of layers that share block tables, and how many blocks a sequence takes in each.

A layer with a sliding window needs K and V of the last tokens only, a full layer those of all. So
each kind has block tables of its own, and blocks that a window has left behind are used again. One
pool serves all groups, since all blocks have one size: a block holds K and V of `block_size` tokens
in the layers of one group, and every group has at most `num_places` layers.

    gpt-oss, 24 layers       12 full                 12 with a window of 128
                             group 0, 12 places      group 1, 12 places

    Gemma 3 27B, 62 layers   10 full                 52 with a window of 1,024
                             group 0, 10 places      groups 1 to 6, 9 or 8 of 10 places

A sequence of 32,768 tokens takes 2,048 blocks of group 0, and of every other group as many as its
window and one step's tokens fill. If a model needs one table only, because its layers are all full
or its windows reach as far as its context, there is one group.

A window is a number of tokens, and its sign says how it moves. One of w > 0 tokens slides: a token
attends to the last w, itself included. One of -c stands for chunks of c tokens (Llama 4): a token
attends to those from the last multiple of c on.
"""

from __future__ import annotations

from collections import abc
from functools import partial
from typing import NamedTuple

MAX_GROUPS = 12
"""Maximum groups of a model: each costs a table, and time of the host, for every sequence."""


class LayerGroup(NamedTuple):
    """Layers that share block tables. They need K and V of the tokens in their `window`, or of all
    tokens if that is None."""

    window: int | None
    layers: tuple[int, ...]


class LayerGroups(NamedTuple):
    """The groups of a model. If there is a full group, it is the first."""

    groups: tuple[LayerGroup, ...]

    @property
    def num_places(self) -> int:
        """The number of layers for which a block has room."""
        return max(len(group.layers) for group in self.groups)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each group."""
        return tuple(group.window for group in self.groups)

    @property
    def frees_blocks(self) -> bool:
        """Whether sequences give blocks back while they run, so that a null block is needed."""
        return any(group.window is not None for group in self.groups)

    def places(self) -> tuple[tuple[int, int], ...]:
        """Return for each layer its group, and its place in that group's blocks."""
        found = {
            layer: (number, place)
            for number, group in enumerate(self.groups)
            for place, layer in enumerate(group.layers)
        }
        return tuple(found[layer] for layer in range(len(found)))

    def count_layers(self, lines: abc.Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return for each group how many layers have the first of their `lines` there, if it is
        lines of the KV cache that the groups consist of."""
        places = self.places()
        firsts = [places[first][0] for first, *_ in lines]
        return tuple(firsts.count(group) for group in range(len(self.groups)))

    def places_of(
        self, lines: abc.Sequence[tuple[int, ...]]
    ) -> tuple[tuple[tuple[int, int], ...], ...] | None:
        """Return the groups and places of each layer's `lines`; None if there is one group and
        layer i has line i."""
        if len(self.groups) == 1 and all(line == (i,) for i, line in enumerate(lines)):
            return None
        places = self.places()
        return tuple(tuple(places[line] for line in parts) for parts in lines)

    @classmethod
    def one_table(cls, num_layers: int) -> LayerGroups:
        """Return one group of all layers, whose blocks are kept for all tokens."""
        return cls((LayerGroup(None, tuple(range(num_layers))),))

    @classmethod
    def choose(
        cls, windows: abc.Sequence[int | None], max_model_len: int, block_size: int
    ) -> LayerGroups:
        """Choose the groups for layers with these windows (None for a full layer).

        Of all group sizes that make at most MAX_GROUPS, it is the one with which a sequence of
        `max_model_len` tokens takes the least memory, and among equals the one with the fewest
        groups. A window that reaches over the whole context is none.
        """
        kinds: dict[int | None, list[int]] = {}
        for layer, window in enumerate(windows):
            kept = window if window is not None and abs(window) < max_model_len else None
            kinds.setdefault(kept, []).append(layer)
        one_table = cls.one_table(len(windows))
        if set(kinds) == {None}:
            return one_table
        # Full layers are one group, because their blocks cost most if places of them stay empty.
        fewest = len(kinds.get(None, ())) or 1
        sizes = range(fewest, max(map(len, kinds.values())) + 1)
        choices = [one_table, *(cls._of_size(kinds, size) for size in sizes)]
        fitting = [one for one in choices if len(one.groups) <= MAX_GROUPS]
        return min(
            fitting,
            key=lambda one: (
                one.num_places * blocks_needed(one.windows, block_size, max_model_len),
                len(one.groups),
            ),
        )

    @classmethod
    def _of_size(cls, kinds: dict[int | None, list[int]], size: int) -> LayerGroups:
        """Return the groups of at most `size` layers, as even as possible: the full one, then those
        with the widest windows."""
        order = sorted(kinds, key=lambda one: (one is not None, -abs(one or 0), one or 0))
        groups = []
        for window in order:
            layers = kinds[window]
            count = -(-len(layers) // size)
            ends = [len(layers) * part // count for part in range(count + 1)]
            for begin, end in zip(ends, ends[1:], strict=False):
                groups.append(LayerGroup(window, tuple(layers[begin:end])))
        return cls(tuple(groups))


def first_token(window: int, position: int) -> int:
    """Return the position of the first token that the one at `position` attends to."""
    return position // -window * -window if window < 0 else max(position + 1 - window, 0)


def first_needed(window: int, num_computed: int, block_size: int) -> int:
    """Return the index of the first block that tokens from position `num_computed` on attend to."""
    return first_token(window, num_computed) // block_size


def describe_window(window: int | None) -> str:
    """Return which tokens layers with this window keep, for people."""
    if window is None:
        return "all tokens"
    return f"the last {window:,}" if window > 0 else f"chunks of {-window:,}"


def blocks_needed(
    windows: abc.Sequence[int | None],
    block_size: int,
    num_tokens: int,
    *,
    num_shared: int = 0,
    width: int = 1,
    step_tokens: int = 1,
) -> int:
    """Return the maximum number of blocks that `width` sequences of `num_tokens` tokens hold at a
    time, in groups with these windows; they share the full blocks of their first `num_shared`
    tokens.

    A windowed group holds what the window covers, and the tokens of steps whose results have not
    arrived: `step_tokens` of all the sequences. Neither begins with a block, hence one block more;
    and if they share those steps, another one.
    """
    shared = num_shared // block_size
    full = shared + width * (-(-num_tokens // block_size) - shared)
    return sum(
        full if window is None else min(full, _held(window, block_size, width, step_tokens))
        for window in windows
    )


def _held(window: int, block_size: int, width: int, step_tokens: int) -> int:
    each = -(-abs(window) // block_size) + (1 if width == 1 else 2)
    return width * each + -(-step_tokens // block_size)


def longest_that_fits(
    windows: abc.Sequence[int | None],
    block_size: int,
    num_blocks: int,
    most: int,
    *,
    num_shared: int = 0,
    width: int = 1,
    step_tokens: int = 1,
) -> int:
    """Return the largest number of tokens, at least `num_shared` and at most `most`, of which
    `width` sequences fit into `num_blocks` blocks. The arguments are those of `blocks_needed`."""
    needed = partial(
        blocks_needed,
        windows,
        block_size,
        num_shared=num_shared,
        width=width,
        step_tokens=step_tokens,
    )
    low, high = num_shared, most
    if needed(high) <= num_blocks:
        return high
    while low < high:  # the number of blocks grows with the number of tokens
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= num_blocks else (low, middle - 1)
    return low
