"""Normalise, rotate and store in one launch: all steps from the QKV projection to attention.

Rotary embedding (RoFormer, arXiv 2104.09864) in the half-rotation layout, after an optional RMSNorm
(arXiv 1910.07467) of each head:

    head      [ first: rotary_dim / 2 | second: rotary_dim / 2 | rest: head_dim − rotary_dim ]
    rotated   [ first·cos − second·sin | second·cos + first·sin | rest ]

With `pairs`, first and second take turns instead: the elements 2i and 2i + 1 rotate together.

The grid is (token, heads of Q | heads of K | heads of V), HEADS heads per program. Rotated queries
go to `out`, rotated K and unchanged V to their slots in the caches.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ..checks import (
    FLOAT_DTYPES,
    check_cache,
    once_a_signature,
    require,
    require_contiguous,
    require_dtype,
    require_last_contiguous,
    require_launchable,
    require_shape,
)
from .dependent_launch import begin_program, launch_options
from .fp8 import bits_view, check_scales, load_scale, store_as


# Over 50 lines: 16 parameters.
@triton.jit
def _rotate_heads(
    target_ptr,
    source_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    source_lines,
    target_lines,
    real,
    scale,
    eps,
    NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Normalise, rotate and store HEADS heads.

    source_lines and target_lines `[HEADS]` are the offsets of the heads' first elements, `real`
    says which heads exist, and `scale` is that of a float8 cache or None.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    REST: tl.constexpr = HEAD_DIM - ROTARY_DIM
    dim = tl.arange(0, HALF_PAD)[None, :]
    rest_dim = ROTARY_DIM + tl.arange(0, REST_PAD)[None, :]
    if PAIRS:
        one, other = 2 * dim, 2 * dim + 1
    else:
        one, other = dim, HALF + dim
    mask = real[:, None] & (dim < HALF)
    rest_mask = real[:, None] & (rest_dim < HEAD_DIM)
    source = source_ptr + source_lines[:, None]
    target = target_ptr + target_lines[:, None]
    # 1. Load the head in three parts, so that rotating needs no exchange between threads.
    first = tl.load(source + one, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + other, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    if REST > 0:
        rest = tl.load(source + rest_dim, mask=rest_mask, other=0.0).to(tl.float32)
        if NORM:
            squares += tl.sum(rest * rest, 1)
    # 2. RMSNorm over the whole head, not only its rotary part.
    if NORM:
        factor = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        first *= factor * tl.load(weight_ptr + one, mask=dim < HALF, other=0.0).to(tl.float32)
        second *= factor * tl.load(weight_ptr + other, mask=dim < HALF, other=0.0).to(tl.float32)
        if REST > 0:
            weight = tl.load(weight_ptr + rest_dim, mask=rest_dim < HEAD_DIM, other=0.0)
            rest *= factor * weight.to(tl.float32)
    # 3. Rotate each pair (first[i], second[i]) by the token's angle i, and store.
    cos = tl.load(cos_ptr + dim, mask=dim < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + dim, mask=dim < HALF, other=0.0).to(tl.float32)
    store_as(target + one, first * cos - second * sin, scale, mask)
    store_as(target + other, second * cos + first * sin, scale, mask)
    if REST > 0:
        store_as(target + rest_dim, rest, scale, rest_mask)


# Over 50 lines: 35 parameters.
@triton.jit
def _rope_and_cache_kernel(
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    cos_ptr,
    sin_ptr,
    query_weight_ptr,
    key_weight_ptr,
    kv_scales_ptr,
    eps,
    query_stride_t,
    query_stride_h,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    out_stride_t,
    out_stride_h,
    cos_stride,
    sin_stride,
    NORM_QUERY: tl.constexpr,
    NORM_KEY: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    PDL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    begin_program(PDL)
    QUERY_PARTS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    # 1. The second axis of the grid lists parts of HEADS heads: those of Q, then of K, then of V.
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    in_part = tl.arange(0, HEADS)
    cos_ptr += token * cos_stride
    sin_ptr += token * sin_stride
    # 2. Q is rotated into `out`, also for padding tokens.
    if part < QUERY_PARTS:
        head = part * HEADS + in_part
        _rotate_heads(
            out_ptr, query_ptr, query_weight_ptr, cos_ptr, sin_ptr,
            token * query_stride_t + head * query_stride_h,
            token * out_stride_t + head * out_stride_h,
            head < NUM_HEADS, None, eps, NORM_QUERY, HEAD_DIM, ROTARY_DIM, HALF_PAD, REST_PAD,
            PAIRS,
        )  # fmt: skip
        return
    # 3. K and V go to the token's slot; padding tokens have none.
    slot = tl.load(slot_mapping_ptr + token)
    if slot < 0:
        return
    first_slot = (slot // BLOCK_SIZE) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM)
    first_slot += (slot % BLOCK_SIZE) * HEAD_DIM
    kv_head = (part - QUERY_PARTS) % KV_PARTS * HEADS + in_part
    key_scale = load_scale(kv_scales_ptr, 0, kv_head[:, None], NUM_KV_HEADS)
    value_scale = load_scale(kv_scales_ptr, 1, kv_head[:, None], NUM_KV_HEADS)
    # 4. K is rotated on the way, V is only converted.
    if part < QUERY_PARTS + KV_PARTS:
        _rotate_heads(
            key_cache_ptr, key_ptr, key_weight_ptr, cos_ptr, sin_ptr,
            token * key_stride_t + kv_head * key_stride_h,
            first_slot + kv_head * (BLOCK_SIZE * HEAD_DIM),
            kv_head < NUM_KV_HEADS, key_scale, eps, NORM_KEY, HEAD_DIM, ROTARY_DIM, HALF_PAD,
            REST_PAD, PAIRS,
        )  # fmt: skip
    else:
        value_head = kv_head[:, None]
        dim = tl.arange(0, DIM_PAD)[None, :]
        mask = (value_head < NUM_KV_HEADS) & (dim < HEAD_DIM)
        source = value_ptr + token * value_stride_t + value_head * value_stride_h + dim
        target = value_cache_ptr + first_slot + value_head * (BLOCK_SIZE * HEAD_DIM) + dim
        store_as(target, tl.load(source, mask=mask), value_scale, mask)


def _check_rotation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotary_dim: int,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Raise ValueError unless the heads, weights and angles fit one another."""
    num_tokens, width = cos.shape
    head_dim = key.shape[-1]
    require_shape("query", query, num_tokens, None, head_dim)
    require_shape("out", out, *query.shape)
    require_dtype("out", out, query.dtype)
    require_shape("value", value, *key.shape)
    for name, tensor in (("query", query), ("key", key), ("value", value), ("out", out)):
        require_dtype(name, tensor, *FLOAT_DTYPES)
        require_last_contiguous(name, tensor)
    for name, tensor in (("cos", cos), ("sin", sin)):
        require_shape(name, tensor, num_tokens, width)
        require_dtype(name, tensor, *FLOAT_DTYPES)
        require_last_contiguous(name, tensor)
    require(
        0 < rotary_dim <= head_dim and rotary_dim % 2 == 0,
        f"rotary_dim must be even and at most head_dim, not {rotary_dim}",
    )
    require(
        width in (rotary_dim, rotary_dim // 2),
        f"cos and sin have {width} columns for {rotary_dim} rotated dimensions",
    )
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight is not None:
            require_shape(name, weight, head_dim)
            require_dtype(name, weight, *FLOAT_DTYPES)
            require_contiguous(name, weight)


@once_a_signature
def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    out: torch.Tensor,
    kv_scales: torch.Tensor | None,
    rotary_dim: int,
) -> None:
    num_kv_heads, _, head_dim = check_cache(key_cache, value_cache)
    check_scales(kv_scales, key_cache, num_kv_heads)
    num_tokens = cos.shape[0]
    require_shape("key", key, num_tokens, num_kv_heads, head_dim)
    _check_rotation(query, key, value, cos, sin, rotary_dim, query_weight, key_weight, out)
    require_shape("slot_mapping", slot_mapping, num_tokens)
    require_dtype("slot_mapping", slot_mapping, torch.int64)
    require_contiguous("slot_mapping", slot_mapping)
    require_launchable(
        query=query, key=key, value=value, key_cache=key_cache, value_cache=value_cache,
        slot_mapping=slot_mapping, cos=cos, sin=sin, query_weight=query_weight,
        key_weight=key_weight, out=out, kv_scales=kv_scales,
    )  # fmt: skip


def rope_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    rotary_dim: int | None = None,
    pairs: bool = False,
    out: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:  # over 50 lines: 15 parameters to describe, check and pass on
    """Rotate queries and keys, write K and V to their slots, and return the rotated queries.

    Each head is first normalised (RMSNorm over head_dim) if its weight is given. query is
    `[num_tokens, num_heads, head_dim]`, key and value are `[num_tokens, num_kv_heads, head_dim]`,
    each with a contiguous last dimension; `out=query` overwrites the queries. cos and sin are
    `[num_tokens, rotary_dim]` in Hugging Face's half-rotation layout, whose second half equals the
    first, or only their first halves if `rotary_dim` is given. `pairs` rotates elements 2i and
    2i + 1, by the i-th angle. slot_mapping is `[num_tokens]`
    int64, negative for tokens whose K and V are skipped; kv_scales is that of `reshape_and_cache`.
    `pdl` launches it as dependent_launch.py says. Raises ValueError on shapes, dtypes or devices
    that do not fit.
    """
    out = torch.empty_like(query) if out is None else out
    num_tokens, width = cos.shape
    rotary_dim = width if rotary_dim is None else rotary_dim
    _check(
        query, key, value, key_cache, value_cache, slot_mapping, cos, sin, query_weight, key_weight,
        out, kv_scales, rotary_dim,
    )  # fmt: skip
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    if num_tokens == 0:
        return out
    num_heads = query.shape[1]
    dim_pad = triton.next_power_of_2(head_dim)
    heads = min(triton.next_power_of_2(num_kv_heads), max(1, 1024 // dim_pad))
    parts = triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
    _rope_and_cache_kernel[(num_tokens, parts)](
        out, query, key, value, bits_view(key_cache), bits_view(value_cache), slot_mapping, cos,
        sin, query_weight, key_weight, kv_scales, eps,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        value.stride(0), value.stride(1), out.stride(0), out.stride(1),
        cos.stride(0), sin.stride(0),
        NORM_QUERY=query_weight is not None,
        NORM_KEY=key_weight is not None,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        HEADS=heads,
        DIM_PAD=dim_pad,
        HALF_PAD=triton.next_power_of_2(rotary_dim // 2),
        REST_PAD=triton.next_power_of_2(max(1, head_dim - rotary_dim)),
        PDL=pdl,
        PAIRS=pairs,
        num_warps=4 if heads * dim_pad >= 512 else 1,
        **launch_options(pdl),
    )  # fmt: skip
    return out
