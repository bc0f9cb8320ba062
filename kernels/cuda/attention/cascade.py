"""Attend a prefix that a group of sequences shares once for the whole group.

Without this, a decode step reads K and V of a shared prefix once per sequence, although the blocks
are the same. Here, as in cascade inference (FlashInfer, arXiv 2501.01005), the query rows of all
members are packed into tiles and read the shared blocks once per tile. `paged_attention_decode`
then attends each member's own keys and merges both by their log-sums (see attend_tiles.py).

    grid (kv head, item)     item = (members of one tile, keys of one split), listed by the host

    rows   member 0: token · group + head | member 1: … | …       BLOCK_M = 128, padded at the end
    keys   full tiles, no mask: every query token comes after the prefix
    out    one partial result per member, split and row, at the member's first entry + split
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...checks import require
from ...device_copy import upload_into
from ...prefix_groups import MIN_MEMBERS, CascadeCost, PrefixGroup
from ..fp8 import load_scale, readable_view
from ..tuning import TileConfig, extend_config
from .attend_tiles import attend_tiles, finish_rows, load_query, start_rows, store_partial
from .decode_schedule import DecodeWorkspace


@dataclass(frozen=True)
class CascadeWorkspace:
    """The groups of a step and the scratch buffers of their results, beside a DecodeWorkspace.

    Addresses and sizes are fixed, so a CUDA graph that was captured with it serves any groups, or
    none.
    """

    cost: CascadeCost
    """The cost model that `find_prefix_groups` takes, for this layer's shape; its kv heads are the
    workspace's parts."""
    share: int
    """That of the workspace."""
    config: TileConfig
    tile: int
    """Prefix lengths are multiples of this: the keys per tile of both kernels."""
    prefixes: torch.Tensor
    """`[3, max_num_seqs]` int32: each row's shared tokens, first partial result and number of
    partial results; 0 for rows without a group."""
    members: torch.Tensor
    """`[max_num_seqs]` int32: the rows of the batch that are members, group after group."""
    items: torch.Tensor
    """`[5, max_items]` int32: index of the first in `members`, their number (0: no work), first
    key, end of the keys, split."""
    plan: torch.Tensor
    """The memory of the three tables above, which one copy fills."""
    partials: torch.Tensor
    """`[max_entries, num_parts, query_len * group, head_dim or value_width]` float32."""
    log_sums: torch.Tensor
    """`[max_entries, num_parts, query_len * group]` float32: log2 of each partial's softmax
    denominator."""

    @classmethod
    def allocate(
        cls,
        workspace: DecodeWorkspace,
        *,
        dtype: torch.dtype,
        cache_dtype: torch.dtype | None = None,
        config: TileConfig | None = None,
    ) -> CascadeWorkspace:
        """Allocate for queries of `dtype` and a cache of `cache_dtype` (default: the same).

        Raises ValueError if the workspace has a window, since a window may exclude the prefix, or
        if the query rows of one sequence need more than a tile.
        """
        require(workspace.window is None, "layers with a window cannot use shared prefixes")
        device, num_seqs = workspace.items.device, workspace.max_num_seqs
        rows, width = workspace.query_len * workspace.group, workspace.partials.shape[-1]
        config = config or extend_config(width, dtype, rows * num_seqs, device)
        cost = CascadeCost(
            workspace.num_heads,
            workspace.num_parts,
            width,
            token_size=None if workspace.value_width is None else workspace.head_dim,
            cache_bytes=(cache_dtype or dtype).itemsize,
            query_len=workspace.query_len,
            block_m=config.block_m,
            programs=2 * workspace.num_sms,
        )
        require(cost.members_per_tile > 0, f"{rows} rows do not fit a tile of {config.block_m}")
        # Either every tile has one split, or all tiles together have `programs` / num_parts.
        # The grid has a program for each item, and one without work still waits for its shared
        # memory, so it is bounded by the tiles that groups of at least MIN_MEMBERS can have.
        most = cost.programs // workspace.num_parts
        tiles = -(-num_seqs // MIN_MEMBERS) + num_seqs // cost.members_per_tile
        sizes = [3 * num_seqs, num_seqs, 5 * max(tiles, most)]
        plan = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        prefixes, members, items = torch.split(plan, sizes)
        entries = max(num_seqs, cost.members_per_tile * most)
        shape = (entries, workspace.num_parts, rows, width)
        return cls(
            cost=cost,
            share=workspace.share,
            config=config,
            tile=max(config.block_n, workspace.config.block_n),
            prefixes=prefixes.view(3, num_seqs),
            members=members,
            items=items.view(5, -1),
            plan=plan,
            partials=torch.empty(shape, device=device),
            log_sums=torch.empty(shape[:-1], device=device),
        )

    @property
    def prefix_lens(self) -> torch.Tensor:
        """`[max_num_seqs]` int32: the tokens of each row's shared prefix; 0 without one."""
        return self.prefixes[0]

    def set_groups(self, groups: Sequence[PrefixGroup]) -> None:
        """Use these disjoint groups from the next launch on; one copy that the host does not await.

        Raises ValueError if a row is out of range or in two groups, a length is not a multiple of
        `tile`, or the groups, smaller than MIN_MEMBERS, have too many tiles. The caller guarantees
        that the members of a group have the same blocks up to its `length` and that all of their
        query tokens come after it.
        """
        num_seqs, max_items = len(self.members), self.items.shape[1]
        rows = [row for group in groups for row in group.members]
        require(len(set(rows)) == len(rows), "a row is in two prefix groups")
        require(all(0 <= row < num_seqs for row in rows), f"rows must be below {num_seqs}: {rows}")
        # 1. For each group, split its keys, give every member one partial result per split, and
        #    list an item for each tile of members and each split.
        prefixes = [[0] * num_seqs for _ in range(3)]
        items: list[tuple[int, int, int, int, int]] = []
        tiles = sum(self.cost.num_tiles(len(group.members)) for group in groups)
        first_member = entry = 0
        for members, length in groups:
            require(
                length > 0 and length % self.tile == 0,
                f"a prefix must be a multiple of {self.tile} tokens, not {length}",
            )
            chunk = -(-length // self.cost.num_splits(tiles, length))
            chunk = -(-chunk // self.tile) * self.tile
            begins = range(0, length, chunk)
            for row in members:
                prefixes[0][row], prefixes[1][row], prefixes[2][row] = length, entry, len(begins)
                entry += len(begins)
            end_member = first_member + len(members)
            items += [
                (first, min(self.cost.members_per_tile, end_member - first), begin,
                 min(begin + chunk, length), split)
                for first in range(first_member, end_member, self.cost.members_per_tile)
                for split, begin in enumerate(begins)
            ]  # fmt: skip
            first_member = end_member
        require(len(items) <= max_items, f"{len(items)} items, and room for {max_items}")
        # 2. Lay the tables out as in `plan`, items column by column, padded with 0: no work.
        padding = [0] * (max_items - len(items))
        columns = zip(*items, strict=True) if items else [()] * 5
        host = torch.tensor(
            [*prefixes[0], *prefixes[1], *prefixes[2], *rows, *[0] * (num_seqs - len(rows)),
             *(value for column in columns for value in (*column, *padding))],
            dtype=torch.int32,
        )  # fmt: skip
        upload_into(self.plan, host)


# Over 50 lines: 29 parameters.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_table_ptr"])
def _attend_prefixes_kernel(
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_table_ptr,
    kv_scales_ptr,
    prefixes_ptr,
    members_ptr,
    items_ptr,
    partials_ptr,
    log_sums_ptr,
    scale,
    query_stride_t,
    query_stride_h,
    table_stride,
    prefixes_stride,
    items_stride,
    SOFTCAP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    # 1. Read the item: which members, which keys.
    ROWS: tl.constexpr = QUERY_LEN * GROUP
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    count = tl.load(items_ptr + items_stride + item)
    if count == 0:
        return
    first_member = tl.load(items_ptr + item)
    begin = tl.load(items_ptr + 2 * items_stride + item)
    end = tl.load(items_ptr + 3 * items_stride + item)
    split = tl.load(items_ptr + 4 * items_stride + item)

    # 2. Gather the members' query rows into one tile, ROWS per member.
    packed = tl.arange(0, BLOCK_M)
    row = packed % ROWS
    live = packed // ROWS < count
    seq = tl.load(members_ptr + first_member + packed // ROWS, mask=live, other=0)
    token = seq * QUERY_LEN + row // GROUP
    head = kv_head * GROUP + row % GROUP
    query = load_query(query_ptr, key_cache_ptr, token, head, live, query_stride_t, query_stride_h,
                       HEAD_DIM, DIM_PAD)  # fmt: skip
    rotary = query
    if ROPE_DIM > 0:
        rotary = load_query(query_ptr + HEAD_DIM, key_cache_ptr, token, head, live, query_stride_t,
                            query_stride_h, ROPE_DIM, ROPE_PAD)  # fmt: skip
    cache_head = kv_head if SHARE == 1 else kv_head // SHARE
    CACHE_HEADS: tl.constexpr = NUM_KV_HEADS // SHARE
    key_scale = load_scale(kv_scales_ptr, 0, cache_head, CACHE_HEADS)
    value_scale = load_scale(kv_scales_ptr, 1, cache_head, CACHE_HEADS)
    if key_scale is not None:
        scale *= key_scale
    # 3. Fold the keys for all rows at once. The blocks are the same for every member, so the first
    #    one's table serves; nothing is masked, since all keys come before all query tokens.
    table_ptr = block_table_ptr + tl.load(members_ptr + first_member).to(tl.int64) * table_stride
    acc, row_max, row_sum = start_rows(BLOCK_M, DIM_PAD)
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, query, rotary, key_cache_ptr, value_cache_ptr, table_ptr,
        cache_head, packed, begin, end, end, scale, False, 0, SOFTCAP, CACHE_HEADS, BLOCK_SIZE,
        HEAD_DIM, DIM_PAD, BLOCK_N, ROPE_DIM, ROPE_PAD, PREFETCH,
    )  # fmt: skip
    # 4. Store each row's partial result, for the member's program of the decode kernel to merge.
    acc, log_sum = finish_rows(acc, row_max, row_sum, value_scale)
    entry = tl.load(prefixes_ptr + prefixes_stride + seq, mask=live, other=0) + split
    line = (entry.to(tl.int64) * NUM_KV_HEADS + kv_head) * ROWS + row
    store_partial(partials_ptr, log_sums_ptr, line, live, acc, log_sum, HEAD_DIM, DIM_PAD)


# Over 50 lines: a launch of 29 parameters.
def attend_prefixes(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    *,
    scale: float,
    cascade: CascadeWorkspace,
    softcap: float | None,
    kv_scales: torch.Tensor | None,
) -> None:
    """Store in `cascade` the partial results of every member over its shared prefix.

    A step of `paged_attention_decode`, which has checked the arguments that both share.
    """
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    cost, config, width = cascade.cost, cascade.config, cascade.cost.head_dim
    have = (query.shape[1], num_kv_heads, head_dim)
    want = (cost.num_heads, cost.num_kv_heads // cascade.share, cost.token_size or width)
    require(have == want, f"(heads, kv heads, head_dim) is {have}, but cascade has {want}")
    _attend_prefixes_kernel[(cost.num_kv_heads, cascade.items.shape[1])](
        query,
        readable_view(key_cache),
        None if value_cache is None else readable_view(value_cache),
        block_table,
        kv_scales,
        cascade.prefixes,
        cascade.members,
        cascade.items,
        cascade.partials,
        cascade.log_sums,
        scale,
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        cascade.prefixes.stride(0),
        cascade.items.stride(0),
        SOFTCAP=softcap or 0.0,
        QUERY_LEN=cost.query_len,
        NUM_KV_HEADS=cost.num_kv_heads,
        GROUP=query.shape[1] // cost.num_kv_heads,
        SHARE=cascade.share,
        BLOCK_SIZE=block_size,
        HEAD_DIM=width,
        DIM_PAD=triton.next_power_of_2(width),
        ROPE_DIM=head_dim - width,
        ROPE_PAD=max(16, triton.next_power_of_2(head_dim - width)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PREFETCH=config.prefetch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
