"""Choose the groups of a decode batch whose shared prefix is read once for the whole group.

Attention over a shared prefix can be computed once for all query rows of a group and merged with
each row's attention over its own keys (cascade inference, FlashInfer, arXiv 2501.01005; the kernel
is cuda/attention/cascade.py). This module is only the policy, without torch: block tables and
lengths in, groups out. What decides is not the size of a group but the memory traffic that it
saves: the bytes that its members no longer read, less those that the two-step attention adds.

Example: five tables, of which all share blocks 1 2 and three share 1 2 3 4.

    row 0   1 2 3 4 a …    either one group of rows 0–2 with 4 blocks,
    row 1   1 2 3 4 b …    or one group of rows 0–4 with 2 blocks:
    row 2   1 2 3 4 c …    the groups are disjoint, so whichever saves more bytes is taken
    row 3   1 2 d e f …
    row 4   1 2 g h i …
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

MIN_PREFIX_TOKENS = 512
"""Minimum length of a shared prefix."""
MIN_MEMBERS = 4
"""Minimum number of rows in a group."""
MIN_CHUNK = 256
"""Minimum keys per split of a prefix."""
LAUNCH_BYTES = 13e6
"""The cost of a kernel launch in bytes of memory traffic: 3 µs at 4.3 TB/s."""
BYTES_PER_FLOP = 4.3 / 330
"""Bytes that memory moves in the time of one FLOP of attention: 4.3 TB/s ÷ 330 TFLOP/s (H200)."""


class PrefixGroup(NamedTuple):
    """Rows of the batch (ascending) whose first `length` tokens are in the same blocks."""

    members: tuple[int, ...]
    length: int


class GroupCost(Protocol):
    """A model of the memory traffic that a group saves.

    Query rows are packed into tiles, and each tile reads the shared prefix once.
    """

    @property
    def query_len(self) -> int:
        """New tokens per row, which the prefix must not include."""
        ...

    @property
    def members_per_tile(self) -> int:
        """Members whose query rows fit one tile; 0 (one member needs more) rules out all groups."""
        ...

    def saved_bytes(self, members: int, length: int) -> float:
        """Return the bytes that a group saves per layer, not counting launches; may be negative."""
        ...


@dataclass(frozen=True)
class CascadeCost:
    """The `GroupCost` of one attention layer on a GPU; `saved_bytes` has the formula."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    cache_bytes: int = 2
    """Bytes per element of K or V."""
    query_len: int = 1
    block_m: int = 128
    """Query rows per tile."""
    programs: int = 264
    """Programs that fill the device: two per SM."""
    token_size: int | None = None
    """The numbers that a token has in the cache for each kv head, if they are not K and V of
    `head_dim` each."""

    @property
    def members_per_tile(self) -> int:
        """Members whose query rows (query_len tokens times the heads of a group) fit one tile."""
        return self.block_m // (self.query_len * (self.num_heads // self.num_kv_heads))

    def num_tiles(self, members: int) -> int:
        """Return the number of row tiles that hold this many members."""
        return -(-members // self.members_per_tile)

    def num_splits(self, tiles: int, length: int) -> int:
        """Return how many parts to cut a prefix into when `tiles` row tiles share the device."""
        return max(1, min(self.programs // (tiles * self.num_kv_heads), length // MIN_CHUNK))

    def saved_bytes(self, members: int, length: int) -> float:
        """Return the bytes saved by reading a prefix once per tile instead of once per member.

            members · tokens − max(tiles · tokens, flops as bytes) − partials

        Without the group, each member reads `length` tokens of K and V. With it, each tile reads
        them, unless its matrix products take longer; in addition, every member's partial result
        (float32, one row and one log-sum per query head and split) is written and read back.
        """
        tiles = self.num_tiles(members)
        numbers = self.token_size or 2 * self.head_dim
        tokens = float(length * self.num_kv_heads * numbers * self.cache_bytes)
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
) -> list[PrefixGroup]:  # over 50 lines by its step comments
    """Return disjoint groups of rows that share their leading blocks and save the most bytes.

    block_tables[i] is row i's table, a list or an int32 array, and may be longer than its
    context_lens[i] tokens (new ones included) need; rows of length 0 are padding. A group's length
    is a multiple of `tile`, the keys per tile of the kernels, and ends before every member's first
    query token. The result is empty if all groups together save no more than `launch_bytes`. If no
    `min_members` rows share `min_tokens` tokens, the cost is one lookup per table.
    """
    if cost.members_per_tile == 0:
        return []
    # 1. Bucket the rows by the block that holds token `min_tokens`. Rows that share the minimum
    #    prefix have the same block there, so each bucket can be searched alone, and in a batch
    #    without sharing almost every bucket has one row.
    last = -(-max(min_tokens, 1) // block_size) - 1
    buckets: dict[int, list[int]] = {}
    for row, (table, length) in enumerate(zip(block_tables, context_lens, strict=True)):
        if length - cost.query_len >= max(min_tokens, 1) and len(table) > last:
            buckets.setdefault(int(table[last]), []).append(row)
    # 2. In each bucket that is large enough, sort the tables as bytes: rows with a common beginning
    #    become neighbours, whatever the order of the bytes in an int32.
    groups: list[PrefixGroup] = []
    total = 0.0
    for rows in buckets.values():
        if len(rows) < min_members:
            continue
        tables = {row: _as_bytes(block_tables[row]) for row in rows}
        rows.sort(key=tables.__getitem__)
        # 3. The candidates are the runs of neighbours that share a number of blocks. Runs nest, and
        #    inner runs (fewer rows, longer prefix) come before the one that contains them. `chosen`
        #    is a stack of the best choice for each finished run: its left end, the bytes saved and
        #    the groups. Runs whose left end is inside the current run are taken off the stack, and
        #    the current run as one group replaces them all if it saves more than they do together.
        chosen: list[tuple[int, float, list[PrefixGroup]]] = []
        for left, right, blocks in _shared_runs([tables[row] for row in rows]):
            saved = 0.0
            inside: list[PrefixGroup] = []
            while chosen and chosen[-1][0] >= left:
                _, inner, inner_groups = chosen.pop()
                saved, inside = saved + inner, inside + inner_groups
            members = tuple(sorted(rows[left:right]))
            # 4. Shorten the shared blocks to whole tiles that every member has already computed.
            seen_by_all = min(context_lens[row] for row in members) - cost.query_len
            length = min(blocks * block_size, seen_by_all) // tile * tile
            if length >= min_tokens and right - left >= min_members:
                own = cost.saved_bytes(right - left, length)
                if own > saved:
                    saved, inside = own, [PrefixGroup(members, length)]
            chosen.append((left, saved, inside))
        total += sum(saved for _, saved, _ in chosen)
        groups += [group for _, _, inside in chosen for group in inside]
    # 5. The cascade costs one more launch per layer, which the groups must save together.
    return groups if total > launch_bytes else []


def _as_bytes(table: Sequence[int]) -> bytes:
    """Return the table as the bytes of its int32 block ids."""
    tobytes: Callable[[], bytes] | None = getattr(table, "tobytes", None)
    return array("i", table).tobytes() if tobytes is None else tobytes()


def _shared_runs(tables: list[bytes]) -> Iterator[tuple[int, int, int]]:
    """Yield (left, right, blocks): a run [left, right) of sorted tables and what all of it shares.

    Each run comes after the runs inside it. These are the LCP intervals of a suffix array (longest
    common prefix; Abouelhoda, Kurtz and Ohlebusch, 2004), found in one pass with a stack: `depth`
    is the common prefix of a table and the next one. Where it falls, the open runs that are deeper
    end; where it rises, a run begins at the leftmost table that shares that much.
    """
    open_runs = [(0, 0)]  # (blocks, left) of each run that has not ended, shallowest first
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
    """Return the number of leading blocks that two tables share, found by bisection.

    `guess` is tried first: it is right for most neighbours in a group.
    """
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
