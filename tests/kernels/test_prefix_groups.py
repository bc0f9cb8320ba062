"""Test the groups that are found in block tables, and the cost model that chooses them."""

import random
from itertools import pairwise

import numpy as np
import pytest

from quire.kernels.prefix_groups import LAUNCH_BYTES, CascadeCost, PrefixGroup, find_prefix_groups

LLAMA_8B = CascadeCost(num_heads=32, num_kv_heads=8, head_dim=128)
BLOCK = 16


def tables(*shares: tuple[int, int], width: int = 400) -> list[list[int]]:
    """For each (count, blocks), make `count` tables that share exactly the first `blocks`."""
    fresh = iter(range(10**7))
    found = []
    for count, blocks in shares:
        common = [next(fresh) for _ in range(blocks)]
        found += [common + [next(fresh) for _ in range(width - blocks)] for _ in range(count)]
    return found


def find(block_tables: list[list[int]], length: int = 6000, **options: int) -> list[PrefixGroup]:
    lens = [length] * len(block_tables)
    return find_prefix_groups(block_tables, lens, BLOCK, LLAMA_8B, **options)


def test_64_sequences_that_share_4096_tokens() -> None:
    groups = find(tables((64, 256)))
    assert groups == [PrefixGroup(tuple(range(64)), 4096)]


def test_the_saving_is_the_traffic_avoided() -> None:
    """64 × 4096 tokens of 4 KiB are 1.07 GB.

    If they are shared, two row tiles read the prefix, and the results of 16 splits are written and
    read.
    """
    assert LLAMA_8B.num_tiles(64) == 2 and LLAMA_8B.num_splits(2, 4096) == 16
    partials = 2 * 64 * 16 * 32 * 129 * 4
    compute = 4 * 256 * 8 * 128 * 4096 * 4.3 / 330
    assert LLAMA_8B.saved_bytes(64, 4096) == pytest.approx(64 * 4096 * 4096 - compute - partials)
    memory = CascadeCost(32, 8, 128, block_m=16)
    reads = 16 * 4096 * 4096
    splits = memory.num_splits(16, 4096)
    assert memory.saved_bytes(64, 4096) == pytest.approx(
        64 * 4096 * 4096 - reads - partials / 16 * splits
    )


def test_float8_saves_half_as_much() -> None:
    half = CascadeCost(32, 8, 128, cache_bytes=1)
    assert 0 < half.saved_bytes(64, 4096) < LLAMA_8B.saved_bytes(64, 4096) / 2


@pytest.mark.parametrize(
    "shares,length", [((64, 31), 6000), ((3, 256), 6000), ((64, 256), 513), ((0, 0), 1)]
)
def test_short_rare_or_too_recent_prefixes_are_not_shared(
    shares: tuple[int, int], length: int
) -> None:
    """No group has fewer than 512 tokens or 4 members, or includes a newest token."""
    found = find(tables(shares), length)
    assert found == ([PrefixGroup(tuple(range(64)), 512)] if length == 513 else [])
    assert length != 513 or find(tables(shares), 512) == []


def test_block_tables_may_be_arrays() -> None:
    block_tables = tables((8, 100), (5, 60), (3, 400))
    found = find(np.array(block_tables, dtype=np.int32))  # type: ignore[arg-type]
    assert found == find(block_tables) and len(found) == 2


def test_a_saving_smaller_than_a_launch_is_ignored() -> None:
    block_tables = tables((4, 32), (4, 32), (4, 32))
    saved = LLAMA_8B.saved_bytes(4, 512)
    assert 2 * saved < LAUNCH_BYTES < 3 * saved
    assert find(block_tables[:8]) == []
    assert len(find(block_tables)) == 3, "together they pay for it"


def test_no_group_is_formed_if_nothing_is_saved() -> None:
    """A tile with only one member reads the prefix as often as without sharing.

    Its partial results come on top. If a tile cannot hold even one member, there is no tile to
    share.
    """
    costly = CascadeCost(num_heads=128, num_kv_heads=1, head_dim=64, block_m=128)
    assert costly.saved_bytes(4, 512) < 0
    assert find_prefix_groups(tables((4, 32)), [6000] * 4, BLOCK, costly) == []
    too_wide = CascadeCost(num_heads=256, num_kv_heads=1, head_dim=64, block_m=128)
    assert find_prefix_groups(tables((64, 256)), [6000] * 64, BLOCK, too_wide) == []


def test_the_deeper_of_two_nested_groups_is_chosen_if_it_saves_more() -> None:
    """All tables share 40 blocks and half of them share 250: the group of that half saves more."""
    block_tables = tables((64, 40))
    deep = list(range(10**7, 10**7 + 210))
    for table in block_tables[:32]:
        table[40:250] = deep
    assert find(block_tables) == [PrefixGroup(tuple(range(32)), 3968)]
    few = tables((64, 200))
    for table in few[:8]:
        table[200:230] = deep[:30]
    (group,) = find(few)
    assert len(group.members) == 64 and group.length == 3200


def test_lengths_are_whole_tiles_before_every_query() -> None:
    block_tables = tables((8, 100))
    lens = [5000] * 7 + [964]
    (group,) = find_prefix_groups(block_tables, lens, BLOCK, LLAMA_8B)
    assert group == PrefixGroup(tuple(range(8)), 960)
    verify = CascadeCost(32, 8, 128, query_len=5)
    (group,) = find_prefix_groups(block_tables, lens, BLOCK, verify, launch_bytes=0)
    assert group.length == 896


def test_random_tables_give_disjoint_groups_that_really_share() -> None:
    rng = random.Random(0)
    for _ in range(40):
        pool = [[rng.randrange(10**6) for _ in range(120)] for _ in range(3)]
        block_tables, lens = [], []
        for _ in range(rng.randrange(1, 70)):
            shared = rng.choice(pool)[: rng.choice([0, 20, 40, 41, 80, 120])]
            block_tables.append(shared + [rng.randrange(10**6) for _ in range(130 - len(shared))])
            lens.append(rng.choice([0, 1, 600, 1500, 2000]))
        groups = find_prefix_groups(block_tables, lens, BLOCK, LLAMA_8B)
        rows = [row for group in groups for row in group.members]
        assert len(set(rows)) == len(rows)
        for members, length in groups:
            assert length >= 512 and length % 64 == 0 and len(members) >= 4
            assert all(length < lens[row] for row in members)
            heads = [block_tables[row][: -(-length // BLOCK)] for row in members]
            assert all(one == other for one, other in pairwise(heads))
        total = sum(LLAMA_8B.saved_bytes(len(g.members), g.length) for g in groups)
        assert not groups or total > LAUNCH_BYTES
