"""Copy whole KV blocks in all layers, both K and V or latents, in one launch.

The copy-on-write of a paged cache (vLLM, arXiv 2309.06180): a block that several sequences share is
copied before one of them writes to it. The grid is (pair, layer and K or V, part of the block). A
block of one layer is num_kv_heads * block_size * head_dim contiguous elements; each program moves
CHUNK of them, 16 bytes per thread and load.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ..checks import (
    CACHE_DTYPES,
    require_contiguous,
    require_dtype,
    require_launchable,
    require_shape,
)
from .fp8 import bits_view


@triton.jit(
    do_not_specialize=["num_blocks"],
    do_not_specialize_on_alignment=["sources_ptr", "destinations_ptr"],
)
def _copy_blocks_kernel(
    kv_cache_ptr,
    sources_ptr,
    destinations_ptr,
    num_blocks,
    BLOCK_ELEMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    source = tl.load(sources_ptr + tl.program_id(0))
    destination = tl.load(destinations_ptr + tl.program_id(0))
    # A plane is a part of one layer, such as its K; its blocks are contiguous.
    plane = tl.program_id(1).to(tl.int64) * num_blocks
    element = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    mask = element < BLOCK_ELEMENTS
    data = tl.load(kv_cache_ptr + (plane + source) * BLOCK_ELEMENTS + element, mask=mask)
    tl.store(kv_cache_ptr + (plane + destination) * BLOCK_ELEMENTS + element, data, mask=mask)


def copy_blocks(kv_cache: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
    """Copy block sources[i] to block destinations[i], all parts of it, in every layer.

    kv_cache is contiguous `[num_layers, parts, num_blocks, num_kv_heads, block_size, head_dim]`,
    whose parts are K and V, or one of latents; the block ids are `[n]` int64. All copies run
    concurrently, so a destination must be neither a source nor repeated (not checked). Raises
    ValueError on shapes, dtypes or devices that do not fit.
    """
    require_dtype("kv_cache", kv_cache, *CACHE_DTYPES)
    require_shape("kv_cache", kv_cache, None, None, None, None, None, None)
    require_contiguous("kv_cache", kv_cache)
    num_pairs = sources.shape[0]
    for name, ids in (("sources", sources), ("destinations", destinations)):
        require_dtype(name, ids, torch.int64)
        require_shape(name, ids, num_pairs)
        require_contiguous(name, ids)
    require_launchable(kv_cache=kv_cache, sources=sources, destinations=destinations)
    if num_pairs == 0:
        return
    num_layers, parts, num_blocks, num_kv_heads, block_size, head_dim = kv_cache.shape
    elements = num_kv_heads * block_size * head_dim
    chunk = min(8192 // kv_cache.element_size() * 2, triton.next_power_of_2(elements))
    _copy_blocks_kernel[(num_pairs, num_layers * parts, triton.cdiv(elements, chunk))](
        bits_view(kv_cache),
        sources,
        destinations,
        num_blocks,
        BLOCK_ELEMENTS=elements,
        CHUNK=chunk,
        num_warps=8,
    )
