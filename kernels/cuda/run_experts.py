"""The experts of a mixture: grouped products over pairs of a token and one of its experts.

    sort      pairs → tiles of one expert each, on the device (sort_by_expert.py)
    up        inner[p] = gated(gate · x[token of p], up · x[token of p])
    down      outer[p] = down · inner[p]
    combine   out[t] = Σ_j weights[t, j] · outer[t · top_k + j]

The grid of both products is (columns, tile); programs of tiles that are not used return after one
load. Gate and up are two sums of one program, so that the activation is applied to float32 and
needs no launch. Nothing waits for the device, and no grid depends on what was chosen: a CUDA graph
serves any choice.

Each sum runs over the features in one order, and the sum of a token's experts in the order of its
choices. So a token's result does not depend on the others, as long as tiles have the same shape:
that follows the number of pairs for each expert, and sums of other shapes may differ in their last
bits.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ..checks import (
    FLOAT_DTYPES,
    once_a_signature,
    require,
    require_contiguous,
    require_dtype,
    require_last_contiguous,
    require_launchable,
    require_shape,
)
from .sort_by_expert import SortedPairs, sort_by_expert
from .tuning import ProductConfig, expert_config

BLOCK = 1024
"""Columns per program of the sum."""
NO_GATE, SILU, CLAMPED = 0, 1, 2
"""What becomes of a product: itself, silu(gate) · up, or the clamped gate of gpt-oss."""
Clamp = tuple[float, float]
"""The limit and the alpha of the clamped gate."""


# Over 50 lines: a third of them are its arguments.
@triton.jit(do_not_specialize=["num_pairs"])
def _expert_product_kernel(
    out_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    order_ptr,
    tile_experts_ptr,
    num_pairs,
    input_stride,
    limit,
    alpha,
    PAIRS_PER_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 1. The pairs of this tile, and the rows of x that are theirs.
    tile = tl.program_id(1)
    expert = tl.load(tile_experts_ptr + tile)
    if expert < 0:
        return
    pair = tl.load(order_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    is_real = pair < num_pairs
    row = (tl.where(is_real, pair, 0) // PAIRS_PER_ROW).to(tl.int64)
    # 2. The columns. Those beyond the last read the last, whose results are not stored.
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.minimum(column, COLUMNS - 1)
    ROWS: tl.constexpr = COLUMNS if GATE == 0 else 2 * COLUMNS
    feature = tl.arange(0, BLOCK_K)
    x_ptrs = input_ptr + row[:, None] * input_stride + feature[None, :]
    w_ptrs = weight_ptr + expert.to(tl.int64) * (ROWS * DEPTH)
    w_ptrs += source[:, None] * DEPTH + feature[None, :]
    # 3. Multiply. A tail of features is zero on both sides.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            x = tl.load(x_ptrs + start, mask=is_real[:, None], other=0.0)
            weight = tl.load(w_ptrs + start)
        else:
            inside = (start + feature < DEPTH)[None, :]
            x = tl.load(x_ptrs + start, mask=is_real[:, None] & inside, other=0.0)
            weight = tl.load(w_ptrs + start, mask=inside, other=0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)
        if GATE != 0:
            if DEPTH % BLOCK_K == 0:
                weight = tl.load(w_ptrs + COLUMNS * DEPTH + start)
            else:
                inside = (start + feature < DEPTH)[None, :]
                weight = tl.load(w_ptrs + COLUMNS * DEPTH + start, mask=inside, other=0.0)
            up = tl.dot(x, tl.trans(weight), up, input_precision=PRECISION)
    # 4. Biases and the gate, in float32.
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * ROWS + source
        total += tl.load(bias_ptrs).to(tl.float32)[None, :]
        if GATE != 0:
            up += tl.load(bias_ptrs + COLUMNS).to(tl.float32)[None, :]
    if GATE == 1:
        total *= tl.sigmoid(total) * up
    if GATE == 2:
        total = tl.minimum(total, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        total *= tl.sigmoid(alpha * total) * (up + 1.0)
    out_ptrs = out_ptr + pair.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    mask = is_real[:, None] & (column < COLUMNS)[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    out_ptr, outer_ptr, weights_ptr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < COLUMNS
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(TOP_K):
        pair = token * TOP_K + place
        row = tl.load(outer_ptr + pair * COLUMNS + column, mask=mask, other=0.0)
        total += tl.load(weights_ptr + pair).to(tl.float32) * row.to(tl.float32)
    out_ptrs = out_ptr + token * COLUMNS + column
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


def run_experts(
    input: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    clamp: Clamp | None = None,
    config: ProductConfig | None = None,
) -> torch.Tensor:  # over 50 lines: half of them are its arguments and what they are
    """Return Σ_j weights[t, j] · expert_{chosen[t, j]}(input[t]) for each token t.

    input is `[num_tokens, hidden_size]`, with a contiguous last dimension; chosen `[num_tokens,
    top_k]` int64 and weights of any float type are contiguous, and so is what the experts have, in
    the type of input: gate_up `[num_experts, 2 * size, hidden_size]`, gate first, down
    `[num_experts, hidden_size, size]`, and their biases `[num_experts, 2 * size]` and
    `[num_experts, hidden_size]`. The gate is silu(gate) · up; `clamp` (limit, alpha) makes it
    gate · sigmoid(alpha · gate) · (up + 1), with both limited. `config` is the tile of the first
    product, by default one that fits the number of pairs. Raises ValueError on shapes, dtypes
    or devices that do not fit. Sums are float32; inner and outer values are rounded once.
    """
    _check(input, chosen, weights, gate_up, down, gate_up_bias, down_bias, clamp)
    num_tokens, hidden_size = input.shape
    num_experts, top_k = len(gate_up), chosen.shape[1]
    out = input.new_empty(num_tokens, hidden_size)
    if num_tokens == 0:
        return out
    num_pairs = num_tokens * top_k
    config = config or expert_config(num_pairs / num_experts, input.dtype)
    pairs = sort_by_expert(chosen, num_experts, config.block_m)
    inner = input.new_empty(num_pairs, down.shape[2])
    gate = SILU if clamp is None else CLAMPED
    _multiply(inner, input, gate_up, gate_up_bias, pairs, config, top_k, gate, clamp)
    outer = input.new_empty(num_pairs, hidden_size)
    config = config._replace(block_n=2 * config.block_n)  # one sum instead of two
    _multiply(outer, inner, down, down_bias, pairs, config, 1, NO_GATE, None)
    _combine_kernel[(num_tokens, triton.cdiv(hidden_size, BLOCK))](
        out, outer, weights, TOP_K=top_k, COLUMNS=hidden_size, BLOCK=BLOCK, num_warps=4
    )
    return out


def _multiply(
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pairs: SortedPairs,
    config: ProductConfig,
    pairs_per_row: int,
    gate: int,
    clamp: Clamp | None,
) -> None:
    """Launch one product of all pairs: `out` `[num_pairs, columns]`."""
    num_pairs, columns = out.shape
    limit, alpha = clamp or (0.0, 0.0)
    grid = (triton.cdiv(columns, config.block_n), len(pairs.tile_experts))
    _expert_product_kernel[grid](
        out,
        input,
        weight,
        bias,
        *pairs,
        num_pairs,
        input.stride(0),
        limit,
        alpha,
        PAIRS_PER_ROW=pairs_per_row,
        COLUMNS=columns,
        DEPTH=input.shape[1],
        GATE=gate,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PRECISION="ieee" if input.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@once_a_signature
def _check(
    input: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    clamp: Clamp | None,
) -> None:
    require_shape("input", input, None, None)
    require_dtype("input", input, *FLOAT_DTYPES)
    require_last_contiguous("input", input)
    num_tokens, hidden_size = input.shape
    require_shape("chosen", chosen, num_tokens, None)
    require_dtype("chosen", chosen, torch.int64)
    require_shape("weights", weights, *chosen.shape)
    require_dtype("weights", weights, *FLOAT_DTYPES)
    require_shape("down", down, None, hidden_size, None)
    num_experts, _, size = down.shape
    require_shape("gate_up", gate_up, num_experts, 2 * size, hidden_size)
    if gate_up_bias is not None:
        require_shape("gate_up_bias", gate_up_bias, num_experts, 2 * size)
    if down_bias is not None:
        require_shape("down_bias", down_bias, num_experts, hidden_size)
    parts = {"gate_up": gate_up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    for name, tensor in parts.items():
        if tensor is not None:
            require_dtype(name, tensor, input.dtype)
            require_contiguous(name, tensor)
    require_contiguous("chosen", chosen)
    require_contiguous("weights", weights)
    require(num_experts > 0 and size > 0, f"{num_experts} experts of size {size}")
    require(clamp is None or clamp[0] > 0, f"clamp needs a positive limit, not {clamp}")
    require_launchable(input=input, chosen=chosen, weights=weights, **parts)
