"""A step's inputs, made on the device from one packed upload and what stayed there.

What lies on the device already is not sent again: the block tables of running sequences, one row
each, and the tokens that the last step sampled, which the host need not know. `packed` `[n]` int32
begins with a Record for each row of the batch, in its order; behind them lie the token ids and the
block ids that records point to.

Grid (row, part of its tokens and columns). A program reads changed columns from `packed` and only
unchanged ones from `table`, so it may write the former there while others of its row read.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..checks import (
    require,
    require_contiguous,
    require_dtype,
    require_last_contiguous,
    require_launchable,
    require_shape,
)

PART = 1024
"""Tokens, and columns of the table, of one program."""


class Record(NamedTuple):
    """What `packed` says of a row of the batch, in this order; here each field is of all rows."""

    row: Any
    """Its row of the persistent table."""
    start: Any
    """The position of its first new token."""
    length: Any
    """Its new tokens: rows with one come first."""
    first: Any
    """The index in the batch of its first new token."""
    token: Any
    """Rows with one: its id, or −1 − i for what `sampled[i]` holds. Others: where in `packed`
    their ids begin."""
    known: Any
    """The leading columns of its table that the device has."""
    blocks: Any
    """Where in `packed` those that follow begin, as far as the row's length reaches."""
    sample: Any
    """Its place in `logit_indices`; −1 where it samples nothing."""


FIELDS = len(Record._fields)


@triton.jit
def _load_blocks(packed_ptr, table_ptr, column, mask, known, blocks):
    """Entries of one sequence's table, `table_ptr`, as they are with this step's changes."""
    changed = column >= known
    new = tl.load(packed_ptr + blocks + column - known, mask=mask & changed, other=0)
    old = tl.load(table_ptr + column, mask=mask & ~changed, other=0)
    return tl.where(changed, new, old)


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=["sampled_ptr"])
def _prepare_inputs_kernel(
    packed_ptr,
    sampled_ptr,
    table_ptr,
    input_ids_ptr,
    positions_ptr,
    slots_ptr,
    block_table_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    logit_indices_ptr,
    num_seqs,
    table_stride: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FIELDS: tl.constexpr,
    PART: tl.constexpr,
):
    seq = tl.program_id(0)
    part = tl.program_id(1) * PART
    if (seq == 0) & (part == 0):
        tl.store(query_start_loc_ptr, 0)
    if seq >= num_seqs:
        if part == 0:  # padding, of steps in which every row has one token
            tl.store(input_ids_ptr + seq, 0)
            tl.store(positions_ptr + seq, 0)
            tl.store(slots_ptr + seq, -1)
            tl.store(query_start_loc_ptr + seq + 1, num_seqs)
            tl.store(seq_lens_ptr + seq, 0)
        return
    record = packed_ptr + seq * FIELDS
    table_ptr += tl.load(record).to(tl.int64) * table_stride
    start = tl.load(record + 1)
    length = tl.load(record + 2)
    first = tl.load(record + 3)
    token = tl.load(record + 4)
    known = tl.load(record + 5)
    blocks = tl.load(record + 6)
    sample = tl.load(record + 7)
    end = start + length
    if part == 0:
        tl.store(query_start_loc_ptr + seq + 1, first + length)
        tl.store(seq_lens_ptr + seq, end)
        tl.store(logit_indices_ptr + sample, first + length - 1, mask=sample >= 0)
    offset = part + tl.arange(0, PART)
    if part < length:
        live = offset < length
        position = start + offset
        block = _load_blocks(packed_ptr, table_ptr, position // BLOCK_SIZE, live, known, blocks)
        slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(positions_ptr + first + offset, position.to(tl.int64), mask=live)
        tl.store(slots_ptr + first + offset, slot, mask=live)
        if length > 1:
            ids = tl.load(packed_ptr + token + offset, mask=live)
            tl.store(input_ids_ptr + first + offset, ids.to(tl.int64), mask=live)
        else:
            unknown = token < 0
            sampled = tl.load(sampled_ptr - 1 - token, mask=unknown, other=0)
            tl.store(input_ids_ptr + first, tl.where(unknown, sampled, token.to(tl.int64)))
    num_columns = tl.cdiv(end, BLOCK_SIZE)
    if part < num_columns:
        live = offset < num_columns
        block = _load_blocks(packed_ptr, table_ptr, offset, live, known, blocks)
        target = block_table_ptr + seq.to(tl.int64) * table_stride + offset
        tl.store(target, block, mask=live)
        tl.store(table_ptr + offset, block, mask=live & (offset >= known))


def prepare_inputs(
    packed: torch.Tensor,
    sampled: torch.Tensor,
    table: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    logit_indices: torch.Tensor,
    *,
    num_seqs: int,
    reach: int,
    block_size: int,
) -> None:
    """Write the inputs of a step of `num_seqs` rows, and into `table` what changed of it.

    packed `[n]` int32: Records, ids, blocks; sampled `[…]` int64; table `[…, max_blocks]` int32.
    Written: input_ids, positions, slot_mapping `[T]` int64; block_table `[S, max_blocks]`, of the
    stride of `table`, as far as each row's length reaches; query_start_loc `[S + 1]`, seq_lens
    `[S]` int32; logit_indices `[…]` int64, the last token of each sampling row. Where S exceeds
    num_seqs, every row has one token, T is S, and rows from num_seqs on are padding: length 0,
    slot −1, id and position 0. `reach` is the most new tokens or columns of any row. ValueError on
    shapes, dtypes or devices that do not fit; what `packed` says is not checked.
    """
    size, num_tokens = seq_lens.shape[0], input_ids.shape[0]
    for name, tensor, dtype, length in (
        ("packed", packed, torch.int32, None),
        ("sampled", sampled, torch.int64, None),
        ("input_ids", input_ids, torch.int64, None),
        ("positions", positions, torch.int64, num_tokens),
        ("slot_mapping", slot_mapping, torch.int64, num_tokens),
        ("query_start_loc", query_start_loc, torch.int32, size + 1),
        ("seq_lens", seq_lens, torch.int32, None),
        ("logit_indices", logit_indices, torch.int64, None),
    ):
        require_dtype(name, tensor, dtype)
        require_shape(name, tensor, length)
        require_contiguous(name, tensor)
    for name, tensor in (("table", table), ("block_table", block_table)):
        require_dtype(name, tensor, torch.int32)
        require_last_contiguous(name, tensor)
    require_shape("table", table, None, None)
    require_shape("block_table", block_table, size, table.shape[1])
    require(block_table.stride(0) == table.stride(0), "block_table and table differ in stride")
    require(0 <= num_seqs <= size, f"{num_seqs} sequences do not fit {size} rows")
    require(num_seqs == size or num_tokens == size, "only steps of one token a row are padded")
    require(len(packed) >= num_seqs * FIELDS, f"packed is too short for {num_seqs} sequences")
    require_launchable(
        packed=packed, sampled=sampled, table=table, input_ids=input_ids, positions=positions,
        slot_mapping=slot_mapping, block_table=block_table, query_start_loc=query_start_loc,
        seq_lens=seq_lens, logit_indices=logit_indices,
    )  # fmt: skip
    _prepare_inputs_kernel[(size, max(1, triton.cdiv(reach, PART)))](
        packed,
        sampled,
        table,
        input_ids,
        positions,
        slot_mapping,
        block_table,
        query_start_loc,
        seq_lens,
        logit_indices,
        num_seqs,
        table_stride=table.stride(0),
        BLOCK_SIZE=block_size,
        FIELDS=FIELDS,
        PART=PART,
        num_warps=4,
    )
