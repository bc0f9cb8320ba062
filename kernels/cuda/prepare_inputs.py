"""Build a step's inputs on the device from one packed upload and the state that stays there.

Two things stay on the device and are not sent again: the block tables of the running sequences
(`table`, one row per sequence), and the tokens that the previous step sampled (`sampled`), which
the host may not know yet. The upload `packed` `[n]` int32 holds the rest:

    packed   | Record of row 0 | Record of row 1 | … | token ids | new block ids |
                                                       ↑ token     ↑ blocks  (offsets in a Record)

If the layers have several groups of blocks, each with a table row per sequence, `packed` has the
records of all rows for each group; they differ in where the table is and in what is new of it.

For token i of a row that starts at position `start`:

    position = start + i        slot = table[position // block_size] · block_size
                                       + position % block_size

The grid is (row, part of its tokens and table columns, group). A program takes the columns that
changed from `packed` and only unchanged ones from `table`, so programs of one row may run in any
order although some of them write the changed columns to `table`.
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
"""Tokens and table columns per program."""


class Record(NamedTuple):
    """The nine int32 that `packed` holds for a row of the batch, in this order.

    In this tuple each field is an array over all rows of the batch.
    """

    row: Any
    """The sequence's row in the persistent table."""
    start: Any
    """Position of its first new token."""
    length: Any
    """Number of its new tokens. Rows with one new token come first in the batch."""
    first: Any
    """Index of its first new token in the batch's flat tokens."""
    token: Any
    """For one new token: its id, or −1 − i if it is `sampled[i]`. For several: the offset of their
    ids in `packed`."""
    known: Any
    """Number of leading columns of its table row that the device already has."""
    blocks: Any
    """Offset in `packed` of the block ids for the columns after those, up to the row's length."""
    sample: Any
    """Index in `logit_indices` of its first sample."""
    num_samples: Any
    """Samples of the row: after its last token, and after each token before that if there are
    several. 0 if it samples nothing."""


FIELDS = len(Record._fields)
"""Numbers per Record."""


@triton.jit
def _load_blocks(packed_ptr, table_ptr, column, mask, known, blocks):
    """Load columns of one sequence's block table with this step's changes applied."""
    changed = column >= known
    new = tl.load(packed_ptr + blocks + column - known, mask=mask & changed, other=0)
    old = tl.load(table_ptr + column, mask=mask & ~changed, other=0)
    return tl.where(changed, new, old)


# Over 50 lines: 22 parameters and the nine fields of a record.
@triton.jit(
    do_not_specialize=["num_seqs", "num_tokens", "num_padded", "num_decodes"],
    do_not_specialize_on_alignment=["sampled_ptr"],
)
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
    num_decodes_ptr,
    num_seqs,
    num_tokens,
    num_padded,
    num_decodes,
    slots_stride: tl.constexpr,
    block_table_stride: tl.constexpr,
    table_stride: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FIELDS: tl.constexpr,
    PART: tl.constexpr,
    QUERY_LEN: tl.constexpr,
):
    # 1. Rows beyond the batch are padding. In a mixed step the first of them has all tokens of the
    #    padding, and the others have none. In other steps (of QUERY_LEN tokens per row) the row
    #    tells the indices of its tokens.
    #    What is the same for all groups is written by the programs of each, with the same values.
    seq = tl.program_id(0)
    part = tl.program_id(1) * PART
    group = tl.program_id(2)
    slots_ptr += group.to(tl.int64) * slots_stride
    block_table_ptr += group.to(tl.int64) * block_table_stride
    if (seq == 0) & (part == 0):
        tl.store(query_start_loc_ptr, 0)
        if num_decodes_ptr is not None:
            tl.store(num_decodes_ptr, num_decodes)
    if seq >= num_seqs:
        if num_decodes_ptr is not None:
            if part == 0:
                tl.store(query_start_loc_ptr + seq + 1, num_padded)
                tl.store(seq_lens_ptr + seq, 0)
            if seq == num_seqs:
                token = num_tokens + part + tl.arange(0, PART)
                padding = token < num_padded
                zero = (token * 0).to(tl.int64)
                tl.store(input_ids_ptr + token, zero, mask=padding)
                tl.store(positions_ptr + token, zero, mask=padding)
                tl.store(slots_ptr + token, zero - 1, mask=padding)
        elif part == 0:
            for i in range(QUERY_LEN):
                tl.store(input_ids_ptr + seq * QUERY_LEN + i, 0)
                tl.store(positions_ptr + seq * QUERY_LEN + i, 0)
                tl.store(slots_ptr + seq * QUERY_LEN + i, -1)
            tl.store(query_start_loc_ptr + seq + 1, num_seqs * QUERY_LEN)
            tl.store(seq_lens_ptr + seq, 0)
        return
    # 2. Read the row's record (see `Record`) and write what the row has once.
    record = packed_ptr + (group * num_seqs + seq) * FIELDS
    table_ptr += tl.load(record).to(tl.int64) * table_stride
    start = tl.load(record + 1)
    length = tl.load(record + 2)
    first = tl.load(record + 3)
    token = tl.load(record + 4)
    known = tl.load(record + 5)
    blocks = tl.load(record + 6)
    sample = tl.load(record + 7)
    num_samples = tl.load(record + 8)
    end = start + length
    if part == 0:
        padded = tl.maximum(length, QUERY_LEN)
        tl.store(query_start_loc_ptr + seq + 1, first + padded)
        tl.store(seq_lens_ptr + seq, start + padded)
        for i in range(length, QUERY_LEN):  # tokens beyond the row's own write no K and V
            tl.store(input_ids_ptr + first + i, 0)
            tl.store(positions_ptr + first + i, 0)
            tl.store(slots_ptr + first + i, -1)
        for i in range(num_samples):
            tl.store(logit_indices_ptr + sample + i, first + length - num_samples + i)
    # 3. Positions, slots and ids of this part's tokens. A single id may be unknown to the host: it
    #    is then one of those that the previous step sampled.
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
    # 4. This part's columns of the block table: all go to the step's table, and the changed ones
    #    also to the persistent table.
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
    query_len: int = 1,
    num_tokens: int | None = None,
    num_decodes: int = 0,
    num_decodes_out: torch.Tensor | None = None,
) -> None:  # over 50 lines: eleven tensors to describe, check and pass on
    """Write the inputs of a step of `num_seqs` rows, and the changed columns of `table`.

    Read: packed `[n]` int32 (records, token ids, block ids), sampled `[…]` int64, table
    `[…, max_blocks]` int32. Written: input_ids and positions `[T]`, slot_mapping `[G, T]` int64,
    for G groups of layers; block_table `[G, S, max_blocks]` int32 with the stride of `table`, as
    far as each row's length reaches; query_start_loc `[S + 1]` and seq_lens `[S]` int32;
    logit_indices `[…]` int64, the index of the token before each sample.

    If S is greater than num_seqs, every row has one token, T equals S, and the rows from num_seqs
    on are padding: length 0, slot −1, id and position 0. With a `query_len` above 1, every row has
    room for so many tokens, T equals S · query_len, and rows with fewer are padded at their ends:
    slot −1, id and position 0, counted by seq_lens.

    With `num_decodes_out` `[1]` int32, which gets `num_decodes`, the step is a mixed one: its rows
    have any number of tokens, `num_tokens` in all, and S is greater than num_seqs. Then row
    num_seqs has the tokens from num_tokens on, slot −1, id and position 0, the rows after it have
    none, and all of these have length 0.

    `reach` is the maximum number of new tokens or table columns of any row, padding included in
    mixed steps. Raises ValueError on shapes, dtypes or devices that do not fit; the contents of
    `packed` are not checked.
    """
    size, num_padded = seq_lens.shape[0], input_ids.shape[0]
    groups = slot_mapping.shape[0]
    num_tokens = num_padded if num_tokens is None else num_tokens
    for name, tensor, dtype, length in (
        ("packed", packed, torch.int32, None),
        ("sampled", sampled, torch.int64, None),
        ("input_ids", input_ids, torch.int64, None),
        ("positions", positions, torch.int64, num_padded),
        ("query_start_loc", query_start_loc, torch.int32, size + 1),
        ("seq_lens", seq_lens, torch.int32, None),
        ("logit_indices", logit_indices, torch.int64, None),
    ):
        require_dtype(name, tensor, dtype)
        require_shape(name, tensor, length)
        require_contiguous(name, tensor)
    for name, tensor, dtype in (
        ("slot_mapping", slot_mapping, torch.int64),
        ("table", table, torch.int32),
        ("block_table", block_table, torch.int32),
    ):
        require_dtype(name, tensor, dtype)
        require_last_contiguous(name, tensor)
    require_shape("slot_mapping", slot_mapping, groups, num_padded)
    require_shape("table", table, None, None)
    require_shape("block_table", block_table, groups, size, table.shape[1])
    require(block_table.stride(1) == table.stride(0), "block_table and table differ in stride")
    require(0 <= num_seqs <= size, f"{num_seqs} sequences do not fit {size} rows")
    if num_decodes_out is None:
        even = num_padded == size * query_len
        require(num_seqs == size or even, "only steps of one token per row are padded")
        require(query_len == 1 or even, f"{num_padded} tokens are not {size} rows of {query_len}")
    else:
        require_dtype("num_decodes_out", num_decodes_out, torch.int32)
        require_shape("num_decodes_out", num_decodes_out, 1)
        require(num_seqs < size and query_len == 1, "a mixed step needs a row for its padding")
        require(num_tokens <= num_padded, f"{num_tokens} tokens do not fit {num_padded}")
    records = groups * num_seqs
    require(len(packed) >= records * FIELDS, f"packed is too short for {records} records")
    require_launchable(
        packed=packed, sampled=sampled, table=table, input_ids=input_ids, positions=positions,
        slot_mapping=slot_mapping, block_table=block_table, query_start_loc=query_start_loc,
        seq_lens=seq_lens, logit_indices=logit_indices, num_decodes_out=num_decodes_out,
    )  # fmt: skip
    _prepare_inputs_kernel[(size, max(1, triton.cdiv(reach, PART)), groups)](
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
        num_decodes_out,
        num_seqs,
        num_tokens,
        num_padded,
        num_decodes,
        slots_stride=slot_mapping.stride(0),
        block_table_stride=block_table.stride(0),
        table_stride=table.stride(0),
        BLOCK_SIZE=block_size,
        FIELDS=FIELDS,
        PART=PART,
        QUERY_LEN=query_len,
        num_warps=4,
    )
