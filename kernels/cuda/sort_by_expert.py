"""The rows of a mixture of experts, sorted by expert into tiles, on the device.

A *pair* is a token and one of its top_k experts; pair p belongs to token p // top_k. Each expert
gets whole tiles of BLOCK_M pairs, in the order of the pairs:

    order          [tiles * BLOCK_M]   expert 0: pairs … | padding | expert 1: pairs … | padding …
    tile_experts   [tiles]             the expert of each tile; −1 if the tile is not used

Padding is the number of pairs. The number of tiles is the most that so many pairs can need, which
depends on no choice: a CUDA graph serves any. Both kernels have the grid (expert), and each program
looks at all choices, so that no program waits for another one, and none adds to another's sum.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import torch
import triton
import triton.language as tl

BLOCK = 2048
"""Pairs that a program looks at together."""


class SortedPairs(NamedTuple):
    """The tiles of a step; int32."""

    order: torch.Tensor
    tile_experts: torch.Tensor


@triton.jit(do_not_specialize=["num_pairs"])
def _count_pairs_kernel(counts_ptr, chosen_ptr, num_pairs, BLOCK: tl.constexpr):
    """Count the pairs of the program's expert."""
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        choice = tl.load(chosen_ptr + pair, mask=pair < num_pairs, other=-1)
        found += (choice == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(found, 0))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _place_pairs_kernel(
    order_ptr,
    tile_experts_ptr,
    counts_ptr,
    chosen_ptr,
    num_pairs,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 1. Where the expert's tiles begin: after those of all experts before it.
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERTS_PAD)
    counts = tl.load(counts_ptr + other, mask=other < NUM_EXPERTS, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(other < expert, tiles, 0), 0)
    end = first + tl.sum(tl.where(other == expert, tiles, 0), 0)
    for start in range(first, end, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        tl.store(tile_experts_ptr + tile, tl.zeros((BLOCK,), tl.int32) + expert, mask=tile < end)
    # 2. The last expert's program clears the tiles that are left.
    if expert == NUM_EXPERTS - 1:
        for start in range(end, num_tiles, BLOCK):
            tile = start + tl.arange(0, BLOCK)
            nobody = tl.full((BLOCK,), -1, tl.int32)
            tl.store(tile_experts_ptr + tile, nobody, mask=tile < num_tiles)
    # 3. The pairs, in their order.
    place = first * BLOCK_M
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        choice = tl.load(chosen_ptr + pair, mask=pair < num_pairs, other=-1)
        is_own = (choice == expert).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(is_own, 0) - 1, pair, mask=is_own > 0)
        place += tl.sum(is_own, 0)
    # 4. The padding of its last tile.
    place += tl.arange(0, BLOCK_M)
    padding = tl.zeros((BLOCK_M,), tl.int32) + num_pairs
    tl.store(order_ptr + place, padding, mask=place < end * BLOCK_M)


def sort_by_expert(chosen: torch.Tensor, num_experts: int, block_m: int) -> SortedPairs:
    """Return the pairs of chosen experts `[num_tokens, top_k]` int64, sorted into tiles of
    `block_m`. The caller has checked that chosen is contiguous; experts are from 0 on."""
    num_pairs, device = chosen.numel(), chosen.device
    num_tiles = most_tiles(num_pairs, num_experts, block_m)
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    order = torch.empty(num_tiles * block_m, dtype=torch.int32, device=device)
    tile_experts = torch.empty(num_tiles, dtype=torch.int32, device=device)
    _count_pairs_kernel[(num_experts,)](counts, chosen, num_pairs, BLOCK=BLOCK, num_warps=8)
    _place_pairs_kernel[(num_experts,)](
        order,
        tile_experts,
        counts,
        chosen,
        num_pairs,
        num_tiles,
        NUM_EXPERTS=num_experts,
        EXPERTS_PAD=triton.next_power_of_2(num_experts),
        BLOCK_M=block_m,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return SortedPairs(order, tile_experts)


def most_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Return the number of tiles that suffices whatever experts are chosen: of each expert that
    has a pair, only the last tile has padding."""
    return (num_pairs + min(num_pairs, num_experts) * (block_m - 1)) // block_m
