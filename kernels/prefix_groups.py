"""Which sequences of a decode batch share enough leading blocks to have them read once for all.

Policy without torch: block tables and lengths in, groups out. A group is worth it by bytes, not
by its size: what its members no longer read, against what the two-step attention adds.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

MIN_PREFIX_TOKENS = 512
MIN_MEMBERS = 4
MIN_CHUNK = 256
"""Fewest keys of one split of a prefix."""
LAUNCH_BYTES = 13e6
"""What a launch costs, as bytes: 3 µs at 4.3 TB/s."""
BYTES_PER_FLOP = 4.3 / 330
"""Bytes that memory moves in the time of one FLOP in attention: 4.3 TB/s, 330 TFLOP/s."""


class PrefixGroup(NamedTuple):
    """Rows `members` of the batch, whose first `length` tokens lie in the same blocks."""

    members: tuple[int, ...]
    length: int


class GroupCost(Protocol):
    """What a group saves, with tiles of rows that read a prefix once."""

    @property
    def query_len(self) -> int: ...

    @property
    def members_per_tile(self) -> int:
        """0 where not even one member's rows fit a tile: no groups."""
        ...

    def saved_bytes(self, members: int, length: int) -> float:
        """Bytes of memory traffic a layer that a group saves, launches aside; below 0: a loss."""
        ...


@dataclass(frozen=True)
class CascadeCost:
    """One layer's attention on a GPU as the cost of a group sees it; see `saved_bytes`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    cache_bytes: int = 2
    """Of one element of K or V."""
    query_len: int = 1
    block_m: int = 128
    """Query rows of a tile."""
    programs: int = 264
    """Programs that fill the device: two a multiprocessor."""

    @property
    def members_per_tile(self) -> int:
        return self.block_m // (self.query_len * (self.num_heads // self.num_kv_heads))

    def num_tiles(self, members: int) -> int:
        return -(-members // self.members_per_tile)

    def num_splits(self, tiles: int, length: int) -> int:
        """Parts that a prefix is cut into where `tiles` row tiles share the device."""
        return max(1, min(self.programs // (tiles * self.num_kv_heads), length // MIN_CHUNK))

    def saved_bytes(self, members: int, length: int) -> float:
        """Apart, `members` each read `length` tokens of K and V. Together every tile of rows reads
        them, or is bound by its products, and every member writes and reads one float32 result a
        head and split.
        """
        tiles = self.num_tiles(members)
        tokens = 2.0 * length * self.num_kv_heads * self.head_dim * self.cache_bytes
        flops = 4.0 * tiles * self.block_m * self.num_kv_heads * self.head_dim * length
        results = members * self.query_len * self.num_heads * (self.head_dim + 1) * 4.0
        partials = 2 * results * self.num_splits(tiles, length)
        return members * tokens - max(tiles * tokens, flops * BYTES_PER_FLOP) - partials


def find_prefix_groups(
    block_tables: Sequence[Sequence[int]],
    context_lens: Sequence[int],
    block_size: int,
    cost: GroupCost,
    *,
    tile: int = 64,
    min_tokens: int = MIN_PREFIX_TOKENS,
    min_members: int = MIN_MEMBERS,
    launch_bytes: float = LAUNCH_BYTES,
) -> list[PrefixGroup]:
    """Disjoint groups of rows whose leading blocks are the same, with the most bytes saved.

    Row i's table is block_tables[i], a list or an int32 array, of which its context_lens[i] tokens
    (new ones included) use a part; rows of length 0 are padding. A group's length is a multiple of
    `tile`, the keys of the kernels' tiles, and ends before every member's first query token. Empty
    where the groups together would not save `launch_bytes`. Costs nothing beyond one look at each
    table where no `min_members` rows share `min_tokens` tokens.
    """
    if cost.members_per_tile == 0:
        return []
    last = -(-max(min_tokens, 1) // block_size) - 1
    buckets: dict[int, list[int]] = {}
    for row, (table, length) in enumerate(zip(block_tables, context_lens, strict=True)):
        if length - cost.query_len >= max(min_tokens, 1) and len(table) > last:
            buckets.setdefault(int(table[last]), []).append(row)
    groups: list[PrefixGroup] = []
    total = 0.0
    for rows in buckets.values():
        if len(rows) < min_members:
            continue
        tables = {row: _as_bytes(block_tables[row]) for row in rows}
        rows.sort(key=tables.__getitem__)  # any order that puts equal beginnings together
        # Innermost runs first: a run's group replaces those inside of it where it saves more.
        chosen: list[tuple[int, float, list[PrefixGroup]]] = []
        for left, right, blocks in _shared_runs([tables[row] for row in rows]):
            saved = 0.0
            inside: list[PrefixGroup] = []
            while chosen and chosen[-1][0] >= left:
                _, inner, inner_groups = chosen.pop()
                saved, inside = saved + inner, inside + inner_groups
            members = tuple(sorted(rows[left:right]))
            seen_by_all = min(context_lens[row] for row in members) - cost.query_len
            length = min(blocks * block_size, seen_by_all) // tile * tile
            if length >= min_tokens and right - left >= min_members:
                own = cost.saved_bytes(right - left, length)
                if own > saved:
                    saved, inside = own, [PrefixGroup(members, length)]
            chosen.append((left, saved, inside))
        total += sum(saved for _, saved, _ in chosen)
        groups += [group for _, _, inside in chosen for group in inside]
    return groups if total > launch_bytes else []


def _as_bytes(table: Sequence[int]) -> bytes:
    """Of int32s; an array of such has them already."""
    tobytes: Callable[[], bytes] | None = getattr(table, "tobytes", None)
    return array("i", table).tobytes() if tobytes is None else tobytes()


def _shared_runs(tables: list[bytes]) -> Iterator[tuple[int, int, int]]:
    """Runs [left, right) of sorted tables and the number of leading blocks that all of a run
    share, each run after the ones inside of it: the LCP intervals of a suffix array."""
    open_runs = [(0, 0)]
    depth = 0
    for right in range(1, len(tables) + 1):
        depth = (
            _shared_blocks(tables[right - 1], tables[right], depth) if right < len(tables) else 0
        )
        left = right - 1
        while open_runs[-1][0] > depth:
            blocks, left = open_runs.pop()
            yield left, right, blocks
        if open_runs[-1][0] < depth:
            open_runs.append((depth, left))


def _shared_blocks(one: bytes, other: bytes, guess: int) -> int:
    """Length of the common beginning of two tables, by bisection; at once where it is `guess`, as
    it is for most of a group."""
    size = array("i").itemsize
    low, high = 0, min(len(one), len(other)) // size
    if guess <= high and one[: guess * size] == other[: guess * size]:
        low, end = guess, (guess + 1) * size
        if one[low * size : end] != other[low * size : end]:
            return low
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * size : middle * size] == other[low * size : middle * size]:
            low = middle
        else:
            high = middle - 1
    return low
