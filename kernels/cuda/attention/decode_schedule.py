"""Decide on the device, once per step, which program of the decode kernel reads which keys.

Flash-Decoding splits the keys of a sequence over several programs. Here the contexts of all
sequences are cut into chunks of about total keys / slots, so that the number of programs follows
the number of tokens and not the batch size. The list has a fixed length, num_seqs + slots, so a
CUDA graph that was captured once is valid for any lengths:

    items [5, num_items]   row of the table                 example: lengths 700, 90; chunk 256
      0  sequence, or −1: no work                             0    0    0    1   −1  …
      1  first key                                            0  256  512    0
      2  end of the keys                                    256  512  700   90
      3  the sequence's first item                            0    0    0    3
      4  its number of items (splits)                         3    3    3    1

The only item of a sequence writes the result. Several items leave partial results in the workspace,
and the last of them to finish merges them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...checks import require, require_contiguous, require_dtype, require_launchable, require_shape
from ..tuning import TileConfig, decode_config, decode_rows

PROGRAMS_PER_SM = 4
"""Programs per SM that the extra splits of a step are to fill."""
MIN_CHUNK = 256
"""Minimum keys per item, below which a split costs more than it saves."""
DEFAULT_NUM_SMS = 132
"""SMs to assume without a GPU: those of an H100 or H200."""


@dataclass(frozen=True)
class DecodeWorkspace:
    """The schedule and scratch buffers of `paged_attention_decode` for up to max_num_seqs rows.

    It is allocated once. One schedule serves all layers with the same `window`, so a model that
    mixes windowed and full layers has one workspace for each. Layers can share the scratch because
    they run one after another.
    """

    max_num_seqs: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_width: int | None
    """The numbers of a key that are its value, in a cache of latents."""
    query_len: int
    """Query tokens per sequence."""
    window: int | None
    config: TileConfig
    share: int
    """Into how many *parts* the query heads of each kv head are cut so that those of a sequence fit
    a tile. Each part is to the kernel as the heads of a kv head of its own."""
    slots: int
    """Maximum number of extra splits per part: programs per SM * SMs / num_parts."""
    num_sms: int
    min_chunk: int
    """Minimum keys per item."""
    items: torch.Tensor
    """`[5, max_num_seqs + slots]` int32: the list that the module's docstring describes."""
    partials: torch.Tensor
    """`[max_num_seqs + slots, num_parts, query_len * group, head_dim or value_width]` float32."""
    log_sums: torch.Tensor
    """`[max_num_seqs + slots, num_parts, query_len * group]` float32: log2 of each partial's
    softmax denominator."""
    arrived: torch.Tensor
    """`[max_num_seqs, num_parts]` int32 counters of finished items; all 0 between launches."""

    @property
    def num_parts(self) -> int:
        """The number of parts of query heads; that of kv heads unless these are shared."""
        return self.num_kv_heads * self.share

    @property
    def group(self) -> int:
        """The number of query heads of a part."""
        return self.num_heads // self.num_parts

    # Over 50 lines: 12 parameters and 17 fields.
    @classmethod
    def allocate(
        cls,
        max_num_seqs: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        window: int | None = None,
        query_len: int = 1,
        value_width: int | None = None,
        config: TileConfig | None = None,
        programs_per_sm: int = PROGRAMS_PER_SM,
        min_chunk: int = MIN_CHUNK,
    ) -> DecodeWorkspace:
        """Allocate for queries of `dtype` with `query_len` (1 to 8) tokens per sequence. With a
        `value_width` the cache is of latents.

        Raises ValueError if a size is out of range.
        """
        require(0 < max_num_seqs <= 4096, f"max_num_seqs must be 1 to 4096, not {max_num_seqs}")
        require(1 <= query_len <= 8, f"query_len must be 1 to 8, not {query_len}")
        require(window is None or window > 0, f"window must be positive, not {window}")
        require(num_heads % num_kv_heads == 0, "num_heads must be a multiple of num_kv_heads")
        device = torch.device(device)
        num_sms = DEFAULT_NUM_SMS
        if device.type == "cuda":
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        width = value_width or head_dim
        group = num_heads // num_kv_heads
        of_latents = value_width is not None
        most = decode_rows(width, dtype, device, of_latents=of_latents)
        part = _part_size(group, query_len, most)
        rows, num_parts = query_len * part, num_heads // part
        slots = max(1, programs_per_sm * num_sms // num_parts)
        items = max_num_seqs + slots
        return cls(
            max_num_seqs=max_num_seqs,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_width=value_width,
            query_len=query_len,
            window=window,
            config=config or decode_config(width, dtype, rows, device, of_latents=of_latents),
            share=group // part,
            slots=slots,
            num_sms=num_sms,
            min_chunk=min_chunk,
            items=torch.full((5, items), -1, dtype=torch.int32, device=device),
            partials=torch.empty(items, num_parts, rows, width, device=device),
            log_sums=torch.empty(items, num_parts, rows, device=device),
            arrived=torch.zeros(max_num_seqs, num_parts, dtype=torch.int32, device=device),
        )


def _part_size(group: int, query_len: int, max_rows: int | None) -> int:
    """Return the largest divisor of `group` of which query_len times is at most `max_rows`."""
    if max_rows is None:
        return group
    return max(
        part
        for part in range(1, group + 1)
        if group % part == 0 and (part == 1 or part * query_len <= max_rows)
    )


@triton.jit(
    do_not_specialize=["num_seqs", "num_items"], do_not_specialize_on_alignment=["seq_lens_ptr"]
)
def _build_decode_schedule_kernel(
    items_ptr,
    seq_lens_ptr,
    prefix_lens_ptr,
    num_decodes_ptr,
    num_seqs,
    num_items,
    items_stride,
    SLOTS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    SEQS_PAD: tl.constexpr,
):
    # 1. One lane per sequence: the keys [first_key, length) that it has to read. A window drops the
    #    whole tiles before it; a shared prefix is folded for the whole group by attend_prefixes.
    seq = tl.arange(0, SEQS_PAD)
    if num_decodes_ptr is not None:
        num_seqs = tl.load(num_decodes_ptr)
    lengths = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    first_key = tl.zeros_like(lengths)
    if WINDOW > 0:
        first_key = tl.maximum(lengths - QUERY_LEN + 1 - WINDOW, 0) // TILE * TILE
    if prefix_lens_ptr is not None:
        first_key = tl.load(prefix_lens_ptr + seq, mask=seq < num_seqs, other=0)
    # 2. The chunk, in whole tiles, with which all sequences together need at most SLOTS items more
    #    than there are sequences. A sequence of length 0 gets one item, which writes zeros.
    total = tl.sum((lengths - first_key).to(tl.int64), 0)
    chunk = tl.maximum(tl.cdiv(total, SLOTS), MIN_CHUNK).to(tl.int32)
    chunk = tl.cdiv(chunk, TILE) * TILE
    splits = tl.maximum(tl.cdiv(lengths - first_key, chunk), 1)
    splits = tl.where(seq < num_seqs, splits, 0)
    # 3. A prefix sum places each sequence's items one after another; the rest of the list is −1.
    first_item = tl.cumsum(splits, 0) - splits
    used = tl.sum(splits, 0)
    for start in range(0, num_items, SEQS_PAD):
        item = start + seq
        tl.store(items_ptr + item, item * 0 - 1, mask=(item >= used) & (item < num_items))
    # 4. Write the items, the i-th of every sequence in round i.
    for split in range(tl.max(splits, 0)):
        live = split < splits
        begin = first_key + split * chunk
        target = items_ptr + first_item + split
        tl.store(target, seq, mask=live)
        tl.store(target + items_stride, begin, mask=live)
        tl.store(target + 2 * items_stride, tl.minimum(begin + chunk, lengths), mask=live)
        tl.store(target + 3 * items_stride, first_item, mask=live)
        tl.store(target + 4 * items_stride, splits, mask=live)


def build_decode_schedule(
    seq_lens: torch.Tensor,
    workspace: DecodeWorkspace,
    prefix_lens: torch.Tensor | None = None,
    num_decodes: torch.Tensor | None = None,
) -> None:
    """Write the work list for these sequence lengths `[num_seqs]` int32 into `workspace.items`.

    Call it once per step and workspace, before any layer's `paged_attention_decode` with the same
    seq_lens. prefix_lens `[max_num_seqs]` int32 leaves each row's first prefix_lens[i] keys (a
    multiple of the tile) out of the list, because `attend_prefixes` folds them for a whole group:
    pass `CascadeWorkspace.prefix_lens` exactly when the layers get that cascade. Rows from
    num_decodes `[1]` int32 (on the device) on are no decodes: they get no items, so that the decode
    kernel leaves their part of `out` as it is. The host reads nothing back. Raises ValueError on
    more than max_num_seqs rows.
    """
    num_seqs = seq_lens.shape[0]
    require_dtype("seq_lens", seq_lens, torch.int32)
    require_shape("seq_lens", seq_lens, None)
    require_contiguous("seq_lens", seq_lens)
    require_launchable(
        seq_lens=seq_lens, workspace=workspace.items, prefix_lens=prefix_lens,
        num_decodes=num_decodes,
    )  # fmt: skip
    require(
        0 < num_seqs <= workspace.max_num_seqs,
        f"{num_seqs} sequences do not fit a workspace for {workspace.max_num_seqs}",
    )
    if prefix_lens is not None:
        require_dtype("prefix_lens", prefix_lens, torch.int32)
        require(num_seqs <= len(prefix_lens), "prefix_lens is for fewer sequences")
    if num_decodes is not None:
        require_dtype("num_decodes", num_decodes, torch.int32)
        require_shape("num_decodes", num_decodes, 1)
    _build_decode_schedule_kernel[(1,)](
        workspace.items,
        seq_lens,
        prefix_lens,
        num_decodes,
        num_seqs,
        num_seqs + workspace.slots,
        workspace.items.stride(0),
        SLOTS=workspace.slots,
        MIN_CHUNK=workspace.min_chunk,
        TILE=workspace.config.block_n,
        WINDOW=workspace.window or 0,
        QUERY_LEN=workspace.query_len,
        SEQS_PAD=max(16, triton.next_power_of_2(workspace.max_num_seqs)),
        num_warps=4,
    )
