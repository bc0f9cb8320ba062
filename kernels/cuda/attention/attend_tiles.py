"""Online softmax over tiles of paged K and V, and the merge of partial results.

The attention kernels share these functions. A program keeps three things for each query row: the
running maximum m of its scores, the sum l of its weights, and the weighted sum acc of its values. A
tile of keys updates them (Milakov and Gimelshein, arXiv 1805.02867; as in FlashAttention-2, arXiv
2307.08691, acc is divided by l only at the end), with scores in units of log2:

    m'  = max(m, max s)        w   = 2^(s − m')        r = 2^(m − m')
    l'  = r·l + Σ w            acc' = r·acc + w · V
    out = acc / l              log_sum = m + log2 l

Results over disjoint sets of keys merge by their log_sums (Flash-Decoding; FlashInfer, arXiv
2501.01005): out = Σ 2^log_sum_i · out_i / Σ 2^log_sum_i.

A cache of latents (multi-head latent attention with absorbed projections, DeepSeek-V2, arXiv
2405.04434) has one line of HEAD_DIM + ROPE_DIM numbers for all heads of a token. The whole line is
the key, its first HEAD_DIM numbers are the value too, and they are loaded once for both:

    s = scale · (q[:HEAD_DIM] · c + q[HEAD_DIM:] · r)      acc' = r·acc + w · c      line = c | r
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from ..fp8 import as_operand, widen, widen_in_place

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)
"""Initial running maximum: finite, so that rows without a visible key do not give NaN."""


@triton.jit
def _line_of(token, head, stride_t, stride_h):
    """Return the offset of a token's head in a tensor of queries or results."""
    return token.to(tl.int64) * stride_t + head * stride_h


@triton.jit
def load_query(
    query_ptr,
    key_cache_ptr,
    token,
    head,
    live,
    stride_t,
    stride_h,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Load query rows by token and head, converted to the operands' dtype for this cache.

    Rows that are not `live` are 0.
    """
    dim = tl.arange(0, DIM_PAD)
    rows = tl.load(
        query_ptr + _line_of(token, head, stride_t, stride_h)[:, None] + dim[None, :],
        mask=live[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    return as_operand(rows, key_cache_ptr)


@triton.jit
def store_rows(
    out_ptr,
    rows,
    token,
    head,
    live,
    stride_t,
    stride_h,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    column=0,
):
    """Store rows of results at their tokens and heads; the rows begin with this column."""
    dim = column + tl.arange(0, DIM_PAD)
    tl.store(
        out_ptr + _line_of(token, head, stride_t, stride_h)[:, None] + dim[None, :],
        rows.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (dim < HEAD_DIM)[None, :],
    )


@triton.jit
def first_visible(position, WINDOW: tl.constexpr):
    """Return the first key that a row at `position` sees: with a WINDOW of w > 0 one of its last w,
    with -c the last multiple of c. It is below 0 if a window reaches over the beginning."""
    return position - (WINDOW - 1) if WINDOW > 0 else position - position % -WINDOW


@triton.jit
def start_rows(BLOCK_M: tl.constexpr, DIM_PAD: tl.constexpr):
    """Return the initial (acc, row_max, row_sum) of rows that have seen no key."""
    acc = tl.zeros([BLOCK_M, DIM_PAD], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    return acc, row_max, tl.zeros([BLOCK_M], dtype=tl.float32)


@triton.jit
def _block_ids(table_ptr, start, end, in_tile, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load the id of a tile's block, or one id per key if it spans several; 0 past `end`."""
    key = start if BLOCK_N <= BLOCK_SIZE else start + in_tile
    return tl.load(table_ptr + key // BLOCK_SIZE, mask=key < end, other=0)


@triton.jit
def _load_tile(
    key_cache_ptr,
    value_cache_ptr,
    block,
    kv_head,
    start,
    kv_end,
    MASKED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Load K and V of keys [start, start + BLOCK_N).

    `block` is their block, or `[BLOCK_N]` one for each key. If MASKED, keys from kv_end on are 0.
    """
    dim = tl.arange(0, DIM_PAD)[None, :]
    in_tile = tl.arange(0, BLOCK_N)
    first = (block.to(tl.int64) * NUM_KV_HEADS + kv_head) * (BLOCK_SIZE * HEAD_DIM)
    if BLOCK_N <= BLOCK_SIZE:  # the tile is contiguous, at one scalar address
        first += (start % BLOCK_SIZE) * HEAD_DIM
        in_block = in_tile[:, None] * HEAD_DIM + dim
        key_ptrs = key_cache_ptr + first + in_block
        value_ptrs = value_cache_ptr + first + in_block
    else:
        offsets = first[:, None] + ((in_tile % BLOCK_SIZE)[:, None] * HEAD_DIM + dim)
        key_ptrs = key_cache_ptr + offsets
        value_ptrs = value_cache_ptr + offsets
    if MASKED:
        loaded = (start + in_tile < kv_end)[:, None] & (dim < HEAD_DIM)
        key = tl.load(key_ptrs, mask=loaded, other=0.0)
        value = tl.load(value_ptrs, mask=loaded, other=0.0)
    elif HEAD_DIM != DIM_PAD:
        key = tl.load(key_ptrs, mask=dim < HEAD_DIM, other=0.0)
        value = tl.load(value_ptrs, mask=dim < HEAD_DIM, other=0.0)
    else:
        key = tl.load(key_ptrs)
        value = tl.load(value_ptrs)
    return key, value


@triton.jit
def _load_columns(
    cache_ptr,
    block,
    start,
    kv_end,
    MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LINE: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Load the numbers [FIRST, FIRST + WIDTH) of the latents of keys [start, start + BLOCK_N).

    A token has LINE numbers; the other arguments are those of `_load_tile`.
    """
    column = tl.arange(0, WIDTH_PAD)[None, :]
    in_tile = tl.arange(0, BLOCK_N)
    first = block.to(tl.int64) * (BLOCK_SIZE * LINE) + FIRST
    if BLOCK_N <= BLOCK_SIZE:
        first += (start % BLOCK_SIZE) * LINE
        pointers = cache_ptr + first + (in_tile[:, None] * LINE + column)
    else:
        pointers = cache_ptr + (first[:, None] + ((in_tile % BLOCK_SIZE)[:, None] * LINE + column))
    if MASKED:
        loaded = (start + in_tile < kv_end)[:, None] & (column < WIDTH)
        return tl.load(pointers, mask=loaded, other=0.0)
    elif WIDTH != WIDTH_PAD:
        return tl.load(pointers, mask=column < WIDTH, other=0.0)
    else:
        return tl.load(pointers)


# Over 50 lines: 26 parameters.
@triton.jit
def attend_tiles(
    acc,
    row_max,
    row_sum,
    query,
    rotary,
    key_cache_ptr,
    value_cache_ptr,
    table_ptr,
    kv_head,
    positions,
    begin,
    end,
    kv_end,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    IN_PLACE: tl.constexpr = False,
):
    """Fold keys [begin, end) into (acc, row_max, row_sum); scores are in units of log2.

    `begin` is a multiple of BLOCK_N. If MASKED, a row at position p does not see keys from `kv_end`
    on, keys after p, or (with a WINDOW) keys before `first_visible`. PREFETCH reads block ids one
    tile ahead, so that the loads of K and V in the pipeline do not wait for another load. IN_PLACE
    widens float8 as `widen_in_place` does. With a ROPE_DIM the cache is of latents: `rotary` are
    the last ROPE_DIM numbers of the query rows, and no value_cache_ptr is read.
    """
    in_tile = tl.arange(0, BLOCK_N)
    ahead = _block_ids(table_ptr, begin, end, in_tile, BLOCK_SIZE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        # 1. Load the tile of K and V.
        start = tl.multiple_of(start, BLOCK_N)
        keys = start + in_tile
        if PREFETCH:
            block = ahead
            ahead = _block_ids(table_ptr, start + BLOCK_N, end, in_tile, BLOCK_SIZE, BLOCK_N)
        else:
            block = _block_ids(table_ptr, start, end, in_tile, BLOCK_SIZE, BLOCK_N)
        if ROPE_DIM > 0:
            key = _load_columns(
                key_cache_ptr, block, start, kv_end, MASKED, BLOCK_SIZE, HEAD_DIM + ROPE_DIM, 0,
                HEAD_DIM, DIM_PAD, BLOCK_N,
            )  # fmt: skip
            turned = _load_columns(
                key_cache_ptr, block, start, kv_end, MASKED, BLOCK_SIZE, HEAD_DIM + ROPE_DIM,
                HEAD_DIM, ROPE_DIM, ROPE_PAD, BLOCK_N,
            )  # fmt: skip
            value = key
        else:
            key, value = _load_tile(
                key_cache_ptr, value_cache_ptr, block, kv_head, start, kv_end, MASKED,
                NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, DIM_PAD, BLOCK_N,
            )  # fmt: skip
            if IN_PLACE:
                key, value = widen_in_place(key, query.dtype), widen_in_place(value, query.dtype)
            else:
                key, value = widen(key, query.dtype), widen(value, query.dtype)
        # 2. Scores: the scale is applied with the conversion to log2, not in a pass of its own.
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if ROPE_DIM > 0:
            scores = tl.dot(rotary, tl.trans(turned), scores, input_precision="ieee")
        if SOFTCAP > 0:  # c·tanh(x / c), tanh x = 1 - 2 / (e^2x + 1), bounded as it is 1 by then
            power = tl.minimum(scores * (scale * 2 * LOG2E / SOFTCAP), 64.0)
            scores = 1 - 2 / (tl.exp2(power) + 1)
            to_log2 = SOFTCAP * LOG2E
        else:
            to_log2 = scale * LOG2E
        # 3. Hide what the rows must not see.
        if MASKED:
            visible = (keys[None, :] <= positions[:, None]) & (keys < kv_end)[None, :]
            if WINDOW != 0:
                visible &= keys[None, :] >= first_visible(positions, WINDOW)[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        # 4. The recurrence above.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * to_log2)
        weights = tl.exp2(scores * to_log2 - new_max[:, None])  # one fused multiply-add
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def finish_rows(acc, row_max, row_sum, value_scale):
    """Return the rows' results and the log2 of their softmax denominators.

    A row that has seen no key gets zeros and −∞.
    """
    seen = row_sum > 0
    row_sum = tl.where(seen, row_sum, 1.0)
    acc = acc / row_sum[:, None]
    if value_scale is not None:
        acc *= value_scale
    return acc, tl.where(seen, row_max + tl.log2(row_sum), float("-inf"))


@triton.jit
def store_partial(
    partials_ptr,
    log_sums_ptr,
    line,
    live,
    acc,
    log_sum,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Store the rows' results and log-sums at these lines of the scratch buffers, for the merge."""
    dim = tl.arange(0, DIM_PAD)
    mask = live[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(partials_ptr + line[:, None] * HEAD_DIM + dim[None, :], acc, mask=mask)
    tl.store(log_sums_ptr + line, log_sum, mask=live)


@triton.jit
def _fold_partials(
    acc,
    row_max,
    row_sum,
    partials_ptr,
    log_sums_ptr,
    kv_head,
    first,
    count,
    column,
    NUM_KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Fold the columns [column, column + WIDTH) of partial results [first, first + count), MERGE at
    a time, weighted by 2^log_sum.

    The loads bypass L1, which may hold a line that another SM has overwritten since.
    """
    row = tl.arange(0, ROWS_PAD)
    dim = column + tl.arange(0, WIDTH)
    for start in range(0, count, MERGE):
        split = start + tl.arange(0, MERGE)
        item = ((first + split).to(tl.int64) * NUM_KV_HEADS + kv_head) * ROWS
        line = item[:, None] + row[None, :]
        live = (split < count)[:, None] & (row < ROWS)[None, :]
        log_sum = tl.load(log_sums_ptr + line, mask=live, other=float("-inf"), cache_modifier=".cg")
        partial = tl.load(
            partials_ptr + line[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=live[:, :, None] & (dim < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_max = tl.maximum(row_max, tl.max(log_sum, 0))
        weight = tl.exp2(log_sum - new_max[None, :])
        rescale = tl.exp2(row_max - new_max)
        acc = acc * rescale[:, None] + tl.sum(partial * weight[:, :, None], 0)
        row_sum = row_sum * rescale + tl.sum(weight, 0)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def merge_partials(
    partials_ptr,
    log_sums_ptr,
    first,
    count,
    prefix_partials_ptr,
    prefix_log_sums_ptr,
    first_prefix,
    prefix_count,
    kv_head,
    column,
    NUM_KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Merge these columns of a sequence's partial results with those over its shared prefix, if
    there is one."""
    acc, row_max, row_sum = start_rows(ROWS_PAD, WIDTH)
    acc, row_max, row_sum = _fold_partials(
        acc, row_max, row_sum, partials_ptr, log_sums_ptr, kv_head, first, count,
        column, NUM_KV_HEADS, ROWS, ROWS_PAD, HEAD_DIM, WIDTH, MERGE,
    )  # fmt: skip
    if prefix_partials_ptr is not None:
        acc, row_max, row_sum = _fold_partials(
            acc, row_max, row_sum, prefix_partials_ptr, prefix_log_sums_ptr, kv_head,
            first_prefix, prefix_count, column, NUM_KV_HEADS, ROWS, ROWS_PAD, HEAD_DIM, WIDTH,
            MERGE,
        )  # fmt: skip
    acc, _ = finish_rows(acc, row_max, row_sum, None)
    return acc
