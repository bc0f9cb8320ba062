"""Linear attention with a decay over packed rows, each with its state S `[key_dim, value_dim]`.

    S ← e^g_t · S
    S ← S + k_tᵀ v_t                          Mamba-2 (arXiv 2405.21060), with k = B and q = C
    S ← S + k_tᵀ beta_t (v_t − k_t S)         the gated delta rule (arXiv 2412.06464)
    out_t = scale · q_t S

The grid is (row, head, COLUMNS columns of S, which know nothing of each other). A program keeps its
part of S in registers while the row's tokens pass, one after the other: the form of decodes.
chunked_recurrence.py is that of prompts.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ...checks import (
    FLOAT_DTYPES,
    once_a_signature,
    require,
    require_contiguous,
    require_dtype,
    require_last_contiguous,
    require_launchable,
    require_shape,
)
from .causal_conv import check_rows

COLUMNS = 32
"""Columns of the state per program."""
MAX_KEY_DIM = 256
"""Rows of the state that a program keeps in registers."""
MAX_TOKENS = 2**31 - 1
"""Tokens of a row, without a limit."""


# Over 50 lines: half of them are the arguments.
@triton.jit(
    do_not_specialize=[
        "max_tokens", "query_stride_t", "key_stride_t", "value_stride_t", "decay_stride_t"
    ]
)  # fmt: skip
def _gated_recurrence_kernel(
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    log_decay_ptr,
    beta_ptr,
    states_ptr,
    slots_ptr,
    saves_ptr,
    loc_ptr,
    seq_lens_ptr,
    max_tokens,
    scale,
    query_stride_t,
    key_stride_t,
    value_stride_t,
    decay_stride_t,
    beta_stride_t,
    HAS_BETA: tl.constexpr,
    NORMALISE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(loc_ptr + row), tl.load(loc_ptr + row + 1)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if (slot < 0) | (begin == end) | (end - begin > max_tokens):
        return
    fresh = tl.load(seq_lens_ptr + row) == end - begin
    dim = tl.arange(0, KEY_PAD)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    dims, columns = dim < KEY_DIM, column < VALUE_DIM
    mask = dims[:, None] & columns[None, :]
    place = head * (KEY_DIM * VALUE_DIM) + dim[:, None] * VALUE_DIM + column[None, :]
    SIZE: tl.constexpr = HEADS * KEY_DIM * VALUE_DIM
    state = tl.load(states_ptr + slot * SIZE + place, mask=mask & ~fresh, other=0.0)
    key_at = (head // (HEADS // KEY_HEADS)) * KEY_DIM + dim
    value_at = head * VALUE_DIM + column
    for one in range(begin, end):
        token = begin.to(tl.int64) + (one - begin)
        key = tl.load(key_ptr + token * key_stride_t + key_at, mask=dims, other=0.0)
        query = tl.load(query_ptr + token * query_stride_t + key_at, mask=dims, other=0.0)
        value = tl.load(value_ptr + token * value_stride_t + value_at, mask=columns, other=0.0)
        key, query, value = key.to(tl.float32), query.to(tl.float32), value.to(tl.float32)
        if NORMALISE:
            key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
            query *= tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
        state *= tl.exp(tl.load(log_decay_ptr + token * decay_stride_t + head))
        if HAS_BETA:
            known = tl.sum(state * key[:, None], 0)
            value = (value - known) * tl.load(beta_ptr + token * beta_stride_t + head)
        state += key[:, None] * value[None, :]
        out = tl.sum(state * query[:, None], 0) * scale
        out_ptrs = out_ptr + token * (HEADS * VALUE_DIM) + value_at
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=columns)
        save = tl.load(saves_ptr + token).to(tl.int64)
        if save >= 0:
            tl.store(states_ptr + save * SIZE + place, state, mask=mask)
    tl.store(states_ptr + slot * SIZE + place, state, mask=mask)


@once_a_signature
def check_recurrence(
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
) -> None:
    """Raise ValueError unless these are arguments of `gated_recurrence`."""
    require_shape("key", key, None, None, None)
    num_tokens, key_heads, key_dim = key.shape
    require_shape("query", query, num_tokens, key_heads, key_dim)
    require_shape("value", value, num_tokens, None, None)
    _, heads, value_dim = value.shape
    require(0 < key_dim <= MAX_KEY_DIM, f"the key dim must be 1 to {MAX_KEY_DIM}, not {key_dim}")
    require(heads % key_heads == 0, f"{heads} heads do not share {key_heads} key heads")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_dtype(name, tensor, *FLOAT_DTYPES)
        require_last_contiguous(name, tensor)
        require(tensor.stride(1) == tensor.shape[2], f"the heads of {name} must be contiguous")
    for name, gate in (("log_decay", log_decay), ("beta", beta)):
        if gate is not None:
            require_shape(name, gate, num_tokens, heads)
            require_dtype(name, gate, torch.float32)
            require_last_contiguous(name, gate)
    require_shape("states", states, None, heads, key_dim, value_dim)
    require_dtype("states", states, torch.float32)
    require_contiguous("states", states)
    check_rows(num_tokens, slots, saves, query_start_loc, seq_lens)
    require_launchable(query=query, key=key, value=value, states=states, slots=slots, saves=saves)


# Over 50 lines: half of them pass the arguments on.
def gated_recurrence(
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
    max_tokens: int = MAX_TOKENS,
) -> torch.Tensor:
    """Return what each token reads from its sequence's state, after writing to it; like value.

    Arguments are as in `reference_states.gated_recurrence`, with states in float32. Rows of more
    than `max_tokens` tokens are left alone and get zeros. The computation is in float32 and rounded
    once. Raises ValueError on shapes, dtypes, layouts or devices that do not fit.
    """
    check_recurrence(
        query, key, value, log_decay, beta, states, slots, saves, query_start_loc, seq_lens
    )
    out = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    num_rows, (_, heads, value_dim) = seq_lens.shape[0], value.shape
    if value.numel() == 0 or num_rows == 0:
        return out
    _, key_heads, key_dim = key.shape
    key_pad = triton.next_power_of_2(key_dim)
    _gated_recurrence_kernel[(num_rows, heads, triton.cdiv(value_dim, COLUMNS))](
        out,
        query,
        key,
        value,
        log_decay,
        log_decay if beta is None else beta,
        states,
        slots,
        saves,
        query_start_loc,
        seq_lens,
        max_tokens,
        scale,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        log_decay.stride(0),
        0 if beta is None else beta.stride(0),
        HAS_BETA=beta is not None,
        NORMALISE=normalise,
        HEADS=heads,
        KEY_HEADS=key_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_PAD=key_pad,
        COLUMNS=COLUMNS,
        num_warps=4 if key_pad <= 128 else 8,
    )
    return out
