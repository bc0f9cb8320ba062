"""The recurrence of gated_recurrence.py over prompts, a chunk of tokens at a time, in products.

Within a chunk let G_i be the sum of the log decays up to token i, S₀ the state before it, and u_i
what token i adds to the state along its key (arXiv 2412.06464, in the WY form of arXiv 2406.06484;
without beta this is the chunked form of Mamba-2, arXiv 2405.21060, section 6):

    u_i   = beta_i (v_i − e^G_i k_i S₀ − Σ_{j<i} e^(G_i − G_j) (k_i·k_j) u_j)     or u_i = v_i
    out_i = scale (e^G_i q_i S₀ + Σ_{j≤i} e^(G_i − G_j) (q_i·k_j) u_j)
    S_n   = e^G_n S₀ + Σ_{j≤n} e^(G_n − G_j) k_jᵀ u_j         after n tokens

The first line is a triangular system, (I + L) u = beta (v − e^G k S₀). Hence two kernels:

1. What needs no state, for all chunks at once: scores A of queries and keys, M = (I + L)⁻¹ beta.
   Grid (chunk, head).
2. The state through the chunks, one after the other, with outputs and snapshots; a chunk takes five
   products. Grid (row, head, COLUMNS columns of S, which know nothing of each other).

Lengths of keys and queries are factors of sums, so that products read the tiles as they are. Rows
of fewer than MIN_TOKENS tokens go through `gated_recurrence`. Operands are bfloat16 if keys are, or
else float32 without tensor cores; sums, the system and the state are float32.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ..tuning import chunk_config
from .gated_recurrence import check_recurrence, gated_recurrence

MIN_TOKENS = 16
"""Minimum tokens of a row that takes this form. Fewer are expected to be as fast one by one."""
RELATE_WARPS = 8
"""Warps of the first kernel."""
LOWEST_LOG = tl.constexpr(-40.0)
"""Log decays are at least this: e^−40 of a state is below the rounding of what follows, and sums of
64 keep three digits behind the point, whatever a gate says."""


@triton.jit
def _find_chunk(loc_ptr, chunk, num_rows, CHUNK: tl.constexpr):
    """Return the row that owns a chunk, and its first chunk, by bisection.

    Row r owns the chunks from loc[r] // CHUNK + r up to the next row's. They are never fewer than
    it needs, and no pass over the lengths has to count them.
    """
    low = chunk * 0
    high = low + num_rows
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(loc_ptr + middle) // CHUNK + middle
        low = tl.where(first <= chunk, middle, low)
        high = tl.where(first <= chunk, high, middle)
    return low, tl.load(loc_ptr + low) // CHUNK + low


@triton.jit
def _load_tile(x_ptr, token, stride, place, live, used):
    """Load a head's part of these tokens; what is not live or not used is 0."""
    pointers = x_ptr + token[:, None] * stride + place[None, :]
    return tl.load(pointers, mask=live[:, None] & used[None, :], other=0.0)


@triton.jit
def _squares(tile):
    """Return the sum of squares of each row."""
    wide = tile.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def _invert(lower, operand: tl.constexpr, CHUNK: tl.constexpr):
    """Return (I + lower)⁻¹ of a strictly lower triangular `[CHUNK, CHUNK]`, as four by four blocks.

    Its products have operands of this dtype.
    """
    PARTS: tl.constexpr = 4
    BLOCK: tl.constexpr = CHUNK // PARTS
    # 1. The blocks on the diagonal, all at once, by forward substitution: with a unit of the
    #    identity for each right side, row i of the inverse is e_i − Σ_{j<i} lower[i, j] · row j.
    part, place = tl.arange(0, PARTS), tl.arange(0, BLOCK)
    on_diagonal = part[:, None, None, None] == part[None, None, :, None]
    tiles = tl.reshape(lower, [PARTS, BLOCK, PARTS, BLOCK])
    blocks = tl.sum(tl.where(on_diagonal, tiles, 0.0), 2)
    unit = (place[:, None] == place[None, :]).to(tl.float32)
    inverses = tl.zeros([PARTS, BLOCK, BLOCK], dtype=tl.float32) + unit[None, :, :]
    for row in range(1, BLOCK):
        is_row = (place == row)[None, :, None]
        factors = tl.sum(tl.where(is_row, blocks, 0.0), 1)
        change = tl.sum(factors[:, :, None] * inverses, 1)
        inverses -= tl.where(is_row, change[:, None, :], 0.0)
    # 2. With D the inverses of these blocks, and B what is below them, the whole is
    #    (I + D B)⁻¹ D = (I + (D B)²) (I − D B) D, since (D B)⁴ = 0.
    whole = tl.where(on_diagonal, inverses[:, :, None, :], 0.0)
    whole = tl.reshape(whole, [CHUNK, CHUNK])
    block = tl.arange(0, CHUNK) // BLOCK
    below = tl.where(block[:, None] == block[None, :], 0.0, lower)
    diagonal = whole.to(operand)
    step = tl.dot(diagonal, below.to(operand), input_precision="ieee").to(operand)
    whole -= tl.dot(step, diagonal, input_precision="ieee")
    twice = tl.dot(step, step, input_precision="ieee").to(operand)
    return whole + tl.dot(twice, whole.to(operand), input_precision="ieee")


# Over 50 lines: half of them are the arguments.
@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _relate_tokens_kernel(
    scores_ptr,
    inverse_ptr,
    factors_ptr,
    query_ptr,
    key_ptr,
    log_decay_ptr,
    beta_ptr,
    slots_ptr,
    loc_ptr,
    num_rows,
    num_tokens,
    scale,
    query_stride_t,
    key_stride_t,
    decay_stride_t,
    beta_stride_t,
    HAS_BETA: tl.constexpr,
    NORMALISE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_PART: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # 1. The chunk's tokens. Chunks that no row needs return, and those of rows that are too short.
    chunk, head = tl.program_id(0), tl.program_id(1)
    row, first = _find_chunk(loc_ptr, chunk, num_rows, CHUNK)
    begin, end = tl.load(loc_ptr + row), tl.load(loc_ptr + row + 1)
    start = begin + (chunk - first) * CHUNK
    if (start >= end) | (end - begin < MIN_TOKENS) | (tl.load(slots_ptr + row) < 0):
        return
    index = tl.arange(0, CHUNK)
    live = start + index < end
    token = start.to(tl.int64) + index
    # 2. Products of queries and keys, and of keys with each other, and their lengths.
    operand = scores_ptr.dtype.element_ty
    scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    lower = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    key_squares = tl.zeros([CHUNK], dtype=tl.float32)
    query_squares = tl.zeros([CHUNK], dtype=tl.float32)
    first_place = (head // (HEADS // KEY_HEADS)) * KEY_DIM
    for part in range(0, KEY_DIM, KEY_PART):
        dim = part + tl.arange(0, KEY_PART)
        place, used = first_place + dim, dim < KEY_DIM
        key = _load_tile(key_ptr, token, key_stride_t, place, live, used).to(operand)
        query = _load_tile(query_ptr, token, query_stride_t, place, live, used).to(operand)
        scores = tl.dot(query, tl.trans(key), scores, input_precision="ieee")
        if HAS_BETA:
            lower = tl.dot(key, tl.trans(key), lower, input_precision="ieee")
        if NORMALISE:
            key_squares += _squares(key)
            query_squares += _squares(query)
    key_factor = tl.full([CHUNK], 1.0, dtype=tl.float32)
    query_factor = key_factor * scale
    if NORMALISE:
        key_factor = tl.rsqrt(key_squares + 1e-6)
        query_factor *= tl.rsqrt(query_squares + 1e-6)
    # 3. The sums of the log decays. The second kernel needs them and the lengths too.
    log = tl.load(log_decay_ptr + token * decay_stride_t + head, mask=live, other=0.0)
    total = tl.cumsum(tl.maximum(log, LOWEST_LOG), 0)
    line = token * HEADS + head
    size = num_tokens.to(tl.int64) * HEADS
    tl.store(factors_ptr + line, total, mask=live)
    tl.store(factors_ptr + size + line, key_factor, mask=live)
    tl.store(factors_ptr + 2 * size + line, query_factor, mask=live)
    # 4. Scores, and what is left of the tokens' additions when others read them.
    earlier = index[:, None] >= index[None, :]
    fade = tl.exp(tl.where(earlier, total[:, None] - total[None, :], float("-inf")))
    fade *= key_factor[None, :]
    matrix = line[:, None] * CHUNK + index[None, :]
    scores *= query_factor[:, None] * fade
    tl.store(scores_ptr + matrix, scores.to(operand), mask=live[:, None])
    # 5. The triangular system of the delta rule.
    if HAS_BETA:
        beta = tl.load(beta_ptr + token * beta_stride_t + head, mask=live, other=0.0)
        lower *= (beta * key_factor)[:, None] * fade
        lower = tl.where(index[:, None] > index[None, :], lower, 0.0)
        # float16 has three bits more than bfloat16, and room: of keys of length 1 and beta up to 2
        # nothing in it exceeds 4, as no token makes the state longer but by its own value.
        inverse = _invert(lower, tl.float16 if operand == tl.bfloat16 else operand, CHUNK)
        inverse *= beta[None, :]
        tl.store(inverse_ptr + matrix, inverse.to(operand), mask=live[:, None])


# Over 50 lines: half of them are the arguments.
@triton.jit(do_not_specialize=["num_tokens"])
def _pass_chunks_kernel(
    out_ptr,
    scores_ptr,
    inverse_ptr,
    factors_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    states_ptr,
    slots_ptr,
    saves_ptr,
    loc_ptr,
    seq_lens_ptr,
    num_tokens,
    query_stride_t,
    key_stride_t,
    value_stride_t,
    HAS_BETA: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # 1. The row, and its state.
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(loc_ptr + row), tl.load(loc_ptr + row + 1)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if (slot < 0) | (end - begin < MIN_TOKENS):
        return
    fresh = tl.load(seq_lens_ptr + row) == end - begin
    dim, index = tl.arange(0, KEY_PAD), tl.arange(0, CHUNK)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    dims, columns = dim < KEY_DIM, column < VALUE_DIM
    mask = dims[:, None] & columns[None, :]
    cell = head * (KEY_DIM * VALUE_DIM) + dim[:, None] * VALUE_DIM + column[None, :]
    SIZE: tl.constexpr = HEADS * KEY_DIM * VALUE_DIM
    state = tl.load(states_ptr + slot * SIZE + cell, mask=mask & ~fresh, other=0.0)
    place = (head // (HEADS // KEY_HEADS)) * KEY_DIM + dim
    value_place = head * VALUE_DIM + column
    operand = scores_ptr.dtype.element_ty
    size = num_tokens.to(tl.int64) * HEADS
    for start in range(begin, end, CHUNK):
        # 2. What there is of the chunk.
        live = start + index < end
        token = begin.to(tl.int64) + (start - begin) + index
        key = _load_tile(key_ptr, token, key_stride_t, place, live, dims).to(operand)
        query = _load_tile(query_ptr, token, query_stride_t, place, live, dims).to(operand)
        value = _load_tile(value_ptr, token, value_stride_t, value_place, live, columns)
        line = token * HEADS + head
        matrix = line[:, None] * CHUNK + index[None, :]
        scores = tl.load(scores_ptr + matrix, mask=live[:, None], other=0.0)
        total = tl.load(factors_ptr + line, mask=live, other=0.0)
        key_factor = tl.load(factors_ptr + size + line, mask=live, other=0.0)
        query_factor = tl.load(factors_ptr + 2 * size + line, mask=live, other=0.0)
        last = tl.minimum(start + CHUNK, end) - 1
        whole = tl.load(factors_ptr + last.to(tl.int64) * HEADS + head)
        # 3. What the tokens add to the state.
        before = state.to(operand)
        update = value.to(tl.float32)
        if HAS_BETA:
            known = tl.dot(key, before, input_precision="ieee")
            update -= known * (tl.exp(total) * key_factor)[:, None]
            inverse = tl.load(inverse_ptr + matrix, mask=live[:, None], other=0.0)
            update = tl.dot(inverse, update.to(operand), input_precision="ieee")
        # 4. What they read from it.
        out = tl.dot(query, before, input_precision="ieee")
        out *= (tl.exp(total) * query_factor)[:, None]
        out = tl.dot(scores, update.to(operand), out, input_precision="ieee")
        out_ptrs = out_ptr + token[:, None] * (HEADS * VALUE_DIM) + value_place[None, :]
        kept = live[:, None] & columns[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=kept)
        # 5. Snapshots, of which few chunks have one: as the state below, after fewer tokens.
        save = tl.load(saves_ptr + token, mask=live, other=-1)
        if tl.max(save, 0) >= 0:
            at = tl.min(tl.where(save >= 0, index, CHUNK), 0)
            while at < CHUNK:
                here = tl.sum(tl.where(index == at, total, 0.0), 0)
                target = tl.sum(tl.where(index == at, save, 0), 0).to(tl.int64)
                faded = tl.where(index <= at, tl.exp(tl.minimum(here - total, 0.0)), 0.0)
                added = (update * (faded * key_factor)[:, None]).to(operand)
                snapshot = tl.dot(
                    tl.trans(key), added, state * tl.exp(here), input_precision="ieee"
                )
                tl.store(states_ptr + target * SIZE + cell, snapshot, mask=mask)
                at = tl.min(tl.where((save >= 0) & (index > at), index, CHUNK), 0)
        # 6. The state after the chunk.
        added = (update * (tl.exp(whole - total) * key_factor)[:, None]).to(operand)
        state = tl.dot(tl.trans(key), added, state * tl.exp(whole), input_precision="ieee")
    tl.store(states_ptr + slot * SIZE + cell, state, mask=mask)


# Over 50 lines: half of them pass the arguments on.
def chunked_recurrence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor | None,
    states: torch.Tensor,
    slots: torch.Tensor,
    saves: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    normalise: bool,
) -> torch.Tensor:
    """Return what `gated_recurrence` does, of which this differs by rounding, in a time that is
    short for long rows too.

    Of bfloat16 keys, states and what is added to them are rounded to bfloat16 where they enter a
    product; states stay float32. Raises ValueError on shapes, dtypes, layouts or devices that do
    not fit.
    """
    tensors = (query, key, value, log_decay, beta, states)
    rows = (slots, saves, query_start_loc, seq_lens)
    check_recurrence(*tensors, *rows)
    out = gated_recurrence(
        *tensors, *rows, scale=scale, normalise=normalise, max_tokens=MIN_TOKENS - 1
    )
    num_rows, (num_tokens, heads, value_dim) = seq_lens.shape[0], value.shape
    if value.numel() == 0 or num_rows == 0 or num_tokens < MIN_TOKENS:
        return out
    _, key_heads, key_dim = key.shape
    operand = torch.bfloat16 if key.dtype == torch.bfloat16 else torch.float32
    key_pad = max(16, triton.next_power_of_2(key_dim))
    config = chunk_config(key_pad, operand, value.device)
    chunk = config.tokens
    scores = torch.empty((num_tokens, heads, chunk), dtype=operand, device=value.device)
    inverse = scores if beta is None else torch.empty_like(scores)
    factors = torch.empty((3, num_tokens, heads), dtype=torch.float32, device=value.device)
    shape = {
        "HAS_BETA": beta is not None,
        "HEADS": heads,
        "KEY_HEADS": key_heads,
        "KEY_DIM": key_dim,
        "MIN_TOKENS": MIN_TOKENS,
        "CHUNK": chunk,
    }
    _relate_tokens_kernel[(num_tokens // chunk + num_rows, heads)](
        scores,
        inverse,
        factors,
        query,
        key,
        log_decay,
        log_decay if beta is None else beta,
        slots,
        query_start_loc,
        num_rows,
        num_tokens,
        scale,
        query.stride(0),
        key.stride(0),
        log_decay.stride(0),
        0 if beta is None else beta.stride(0),
        NORMALISE=normalise,
        KEY_PART=min(key_pad, 64),
        num_warps=RELATE_WARPS,
        num_stages=2,
        **shape,
    )
    _pass_chunks_kernel[(num_rows, heads, triton.cdiv(value_dim, config.columns))](
        out,
        scores,
        inverse,
        factors,
        query,
        key,
        value,
        states,
        slots,
        saves,
        query_start_loc,
        seq_lens,
        num_tokens,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        VALUE_DIM=value_dim,
        KEY_PAD=key_pad,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shape,
    )
    return out
