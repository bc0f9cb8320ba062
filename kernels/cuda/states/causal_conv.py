"""The short causal convolution (Mamba, arXiv 2312.00752) over packed rows, each with its state.

    out[t, c] = bias[c] + Σ_j weight[c, j] · x[t − (K − 1) + j, c]

Two launches, since the second overwrites what the first reads. The convolution's grid is (TOKENS
tokens, CHANNELS channels); tokens look for their rows by bisection, so that the grid of a captured
step depends on nothing but its number of tokens. It also stores the snapshots. The grid of the
states is (row, CHANNELS channels): a program moves the last K − 1 inputs, oldest first, each thread
its own channels.
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

CHANNELS = 256
"""Channels per program."""
TOKENS = 8
"""Tokens per program."""


@triton.jit
def _input(x_ptr, state_ptr, source, begin, channel, mask, fresh, x_stride, SIZE, TAPS):
    """Load the inputs of a number of tokens, those before the row from the state."""
    inside = source >= begin
    x = tl.load(x_ptr + source * x_stride + channel, mask=mask & inside, other=0.0)
    line = (TAPS + source - begin) * SIZE
    old = tl.load(state_ptr + line + channel, mask=mask & ~inside & ~fresh, other=0.0)
    return tl.where(inside, x.to(tl.float32), old)


@triton.jit
def _find_rows(loc_ptr, token, num_rows, num_halvings):
    """Return the row of each token: as many rows as end before it or at it. loc is ascending."""
    low = tl.zeros_like(token)
    high = low + num_rows
    for _ in range(num_halvings):
        middle = (low + high) // 2
        end = tl.load(loc_ptr + middle + 1, mask=middle < num_rows, other=2147483647)
        low = tl.where(end <= token, middle + 1, low)
        high = tl.where(end <= token, high, middle)
    return low


@triton.jit(
    do_not_specialize=["x_stride", "out_stride", "weight_stride", "num_rows", "num_halvings"]
)
def _causal_conv_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    states_ptr,
    slots_ptr,
    saves_ptr,
    loc_ptr,
    seq_lens_ptr,
    x_stride,
    out_stride,
    weight_stride,
    num_rows,
    num_halvings,
    HAS_BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # 1. Each token's row, and whether the row's sequence begins in this step.
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    row = _find_rows(loc_ptr, token, num_rows, num_halvings)
    inside = row < num_rows  # or it is padding
    begin = tl.load(loc_ptr + row, mask=inside, other=0)
    end = tl.load(loc_ptr + row + 1, mask=inside, other=0)
    fresh = tl.load(seq_lens_ptr + row, mask=inside, other=0) == end - begin
    slot = tl.load(slots_ptr + row, mask=inside, other=-1).to(tl.int64)
    save = tl.load(saves_ptr + token, mask=inside, other=-1).to(tl.int64)
    token, begin = token.to(tl.int64), begin.to(tl.int64)
    # 2. The sum over the last K inputs.
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    mask = (channel < SIZE) & (slot >= 0)
    state_ptr = states_ptr + slot * (TAPS * SIZE)
    sums = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + channel, mask=channel < SIZE, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS + 1):
        source = token - TAPS + tap
        x = _input(x_ptr, state_ptr, source, begin, channel, mask, fresh, x_stride, SIZE, TAPS)
        weight_ptrs = weight_ptr + channel * weight_stride + tap
        sums += x * tl.load(weight_ptrs, mask=channel < SIZE, other=0.0).to(tl.float32)
        if tap > 0:
            target = states_ptr + save * (TAPS * SIZE) + (tap - 1) * SIZE + channel
            tl.store(target, x, mask=mask & (save >= 0))
    out_ptrs = out_ptr + token * out_stride + channel
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["x_stride"])
def _shift_states_kernel(
    x_ptr,
    states_ptr,
    slots_ptr,
    loc_ptr,
    seq_lens_ptr,
    x_stride,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0)
    begin, end = tl.load(loc_ptr + row).to(tl.int64), tl.load(loc_ptr + row + 1).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if (slot < 0) | (begin == end):
        return
    fresh = tl.load(seq_lens_ptr + row) == end - begin
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < SIZE
    state_ptr = states_ptr + slot * (TAPS * SIZE)
    for tap in tl.static_range(TAPS):  # a line is read before it is overwritten
        source = end - TAPS + tap
        x = _input(x_ptr, state_ptr, source, begin, channel, mask, fresh, x_stride, SIZE, TAPS)
        tl.store(state_ptr + tap * SIZE + channel, x, mask=mask)


@once_a_signature
def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    slots: torch.Tensor,
    saves: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    require_shape("x", x, None, None)
    require_dtype("x", x, *FLOAT_DTYPES)
    require_last_contiguous("x", x)
    num_tokens, size = x.shape
    require_shape("weight", weight, size, None)
    require_dtype("weight", weight, *FLOAT_DTYPES)
    require_last_contiguous("weight", weight)
    if bias is not None:
        require_shape("bias", bias, size)
        require_dtype("bias", bias, *FLOAT_DTYPES)
        require_contiguous("bias", bias)
    require_shape("states", states, None, weight.shape[1] - 1, size)
    require_dtype("states", states, torch.float32)
    require_contiguous("states", states)
    check_rows(num_tokens, slots, saves, query_start_loc, seq_lens)
    require_launchable(x=x, weight=weight, bias=bias, states=states, slots=slots, saves=saves)


def check_rows(
    num_tokens: int,
    slots: torch.Tensor,
    saves: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Raise ValueError unless these describe the rows of a step of so many tokens; see
    `reference_states.causal_conv`."""
    rows = seq_lens.shape[0]
    require_shape("query_start_loc", query_start_loc, rows + 1)
    named = {"slots": slots, "saves": saves, "loc": query_start_loc, "seq_lens": seq_lens}
    for name, tensor in named.items():
        require_dtype(name, tensor, torch.int32)
        require_contiguous(name, tensor)
    require(len(slots) >= rows, f"{len(slots)} slots for {rows} rows")
    require(len(saves) >= num_tokens, f"{len(saves)} saves for {num_tokens} tokens")


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    slots: torch.Tensor,
    saves: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> torch.Tensor:
    """Return the causal convolution of every channel by itself, like x `[T, channels]`.

    Arguments are as in `reference_states.causal_conv`, with states in float32. The computation is
    in float32 and rounded once. Raises ValueError on shapes, dtypes, layouts or devices that do not
    fit.
    """
    _check(x, weight, bias, states, slots, saves, query_start_loc, seq_lens)
    num_rows, (size, taps) = seq_lens.shape[0], (x.shape[1], weight.shape[1] - 1)
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0 or num_rows == 0:
        return out
    blocks = triton.cdiv(size, CHANNELS)
    shared = {"SIZE": size, "TAPS": taps, "CHANNELS": CHANNELS, "num_warps": 4}
    _causal_conv_kernel[(triton.cdiv(x.shape[0], TOKENS), blocks)](
        out,
        x,
        weight,
        x if bias is None else bias,
        states,
        slots,
        saves,
        query_start_loc,
        seq_lens,
        x.stride(0),
        out.stride(0),
        weight.stride(0),
        num_rows,
        num_rows.bit_length(),
        HAS_BIAS=bias is not None,
        TOKENS=TOKENS,
        **shared,
    )
    if taps:
        _shift_states_kernel[(num_rows, blocks)](
            x, states, slots, query_start_loc, seq_lens, x.stride(0), **shared
        )
    return out
