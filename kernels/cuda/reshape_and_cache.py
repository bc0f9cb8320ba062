"""Write K and V, or the latents, of this step's tokens to their slots in one layer's paged cache.

    cache[slot // block_size, head, slot % block_size, :] = x[token, head, :]

The grid is (token, kv heads / HEADS). A program copies the rows of K and V of one token and HEADS
kv heads, head_dim contiguous elements each, 16 bytes per thread and load.
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
    require_launchable,
    require_shape,
)
from .fp8 import bits_view, check_scales, load_scale, store_as


@triton.jit
def _reshape_and_cache_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    kv_scales_ptr,
    key_stride_t,
    key_stride_h,
    key_stride_d,
    value_stride_t,
    value_stride_h,
    value_stride_d,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, DIM_PAD)[None, :]
    mask = (head < NUM_KV_HEADS) & (dim < HEAD_DIM)
    key = tl.load(
        key_ptr + token * key_stride_t + head * key_stride_h + dim * key_stride_d, mask=mask
    )
    if value_ptr is not None:
        value = tl.load(
            value_ptr + token * value_stride_t + head * value_stride_h + dim * value_stride_d,
            mask=mask,
        )
    first = block * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + offset * HEAD_DIM
    target = first + head * (BLOCK_SIZE * HEAD_DIM) + dim
    key_scale = load_scale(kv_scales_ptr, 0, head, NUM_KV_HEADS)
    value_scale = load_scale(kv_scales_ptr, 1, head, NUM_KV_HEADS)
    store_as(key_cache_ptr + target, key, key_scale, mask)
    if value_ptr is not None:
        store_as(value_cache_ptr + target, value, value_scale, mask)


@once_a_signature
def _check(
    key: torch.Tensor,
    value: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor | None,
    value_width: int | None,
) -> None:
    num_kv_heads, _, head_dim = check_cache(key_cache, value_cache, value_width)
    check_scales(kv_scales, key_cache, num_kv_heads)
    num_tokens = slot_mapping.shape[0]
    require_shape("key", key, num_tokens, num_kv_heads, head_dim)
    require_dtype("key", key, *FLOAT_DTYPES)
    require((value is None) == (value_cache is None), "value and value_cache go together")
    if value is not None:
        require_shape("value", value, num_tokens, num_kv_heads, head_dim)
        require_dtype("value", value, *FLOAT_DTYPES)
    require_dtype("slot_mapping", slot_mapping, torch.int64)
    require_contiguous("slot_mapping", slot_mapping)
    require_launchable(
        key=key,
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
        kv_scales=kv_scales,
    )


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    *,
    kv_scales: torch.Tensor | None = None,
    value_width: int | None = None,
) -> None:  # over 50 lines: parameters, their checks, and the kernel's arguments one per line
    """Write K and V `[num_tokens, num_kv_heads, head_dim]`, of any strides, to their slots.

    key_cache and value_cache are one layer's `[num_blocks, num_kv_heads, block_size, head_dim]`.
    slot_mapping `[num_tokens]` int64 holds block_id * block_size + offset, or a negative number for
    padding rows, which are skipped. Values are converted to the cache's dtype; a float8_e4m3fn
    cache stores K / kv_scales[0] and V / kv_scales[1] (`[2, num_kv_heads]` float32, default 1),
    saturated at ±448. Latents (attend_tiles.py) are keys alone, whose first value_width numbers are
    the values: value and value_cache are None. Raises ValueError on shapes, dtypes or devices that
    do not fit. Slots beyond the cache are not checked.
    """
    _check(key, value, key_cache, value_cache, slot_mapping, kv_scales, value_width)
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    num_tokens = slot_mapping.shape[0]
    if num_tokens == 0:
        return
    dim_pad = triton.next_power_of_2(head_dim)
    heads = min(triton.next_power_of_2(num_kv_heads), max(1, 2048 // dim_pad))
    _reshape_and_cache_kernel[(num_tokens, triton.cdiv(num_kv_heads, heads))](
        key,
        value,
        bits_view(key_cache),
        None if value_cache is None else bits_view(value_cache),
        slot_mapping,
        kv_scales,
        *key.stride(),
        *((0, 0, 0) if value is None else value.stride()),
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        HEADS=heads,
        DIM_PAD=dim_pad,
        num_warps=4 if heads * dim_pad >= 1024 else 1,
    )
