"""Tile shapes of the attention kernels by head_dim, dtype and rows.

They are fixed here so that nothing is tuned at run time. The sweeps of `benchmarks/gpu.py` decide
these lines; docs/kernels.md says what was measured.
"""

import functools
from typing import NamedTuple

import torch


class TileConfig(NamedTuple):
    """One compiled shape: rows (packed queries) and keys per tile, warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    prefetch: bool = True
    """Whether to read block ids one tile ahead; see `attend_tiles`."""
    in_place: bool = True
    """Whether decodes widen float8 in the layout it is loaded in, if there is room for both; see
    `widen_in_place`."""


@functools.cache
def compute_capability(device: torch.device) -> int:
    """Return 80 for A100, 90 for H100 or H200, and so on; the interpreter (CPU) counts as 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def extend_config(
    head_dim: int, dtype: torch.dtype, max_rows: int, device: torch.device
) -> TileConfig:
    """Return the tile for `paged_attention_extend`, whose values have head_dim dimensions; max_rows
    is max_query_len * group."""
    if head_dim > 256:
        if dtype == torch.float32:
            return TileConfig(16, 16, 8, 1)
        if compute_capability(device) == 90:
            return TileConfig(64, 32, 8, 2, prefetch=False)  # ids read ahead would be spilled
        return TileConfig(32, 32, 8, 2)
    if dtype == torch.float32:
        return TileConfig(32, 16, 8, 1)  # no tensor cores: small enough not to spill
    block_m, num_warps = (64, 4) if max_rows <= 64 else (128, 8)
    # Without wgmma the operands are in registers too, and larger tiles spill.
    wgmma = compute_capability(device) == 90
    if head_dim > 128:
        return TileConfig(block_m, 32, num_warps, 2) if wgmma else TileConfig(64, 32, 8, 2)
    if wgmma and block_m == 128:
        # Twice the keys for 1.57 times the instructions, and half the barriers.
        return TileConfig(128, 128, 8, 2)
    return TileConfig(block_m, 64 if wgmma or head_dim <= 64 else 32, num_warps, 3)


def decode_rows(
    value_width: int, dtype: torch.dtype, device: torch.device, *, of_latents: bool
) -> int | None:
    """Return the maximum number of query rows of a tile of `paged_attention_decode`, whose values
    have so many dimensions. None: a tile has all query heads of a kv head."""
    if value_width <= 256:
        return 64 if of_latents else None
    if dtype == torch.float32:
        return 16
    return 64 if compute_capability(device) == 90 else 32


def decode_config(
    head_dim: int,
    dtype: torch.dtype,
    rows: int,
    device: torch.device,
    *,
    of_latents: bool = False,
) -> TileConfig:
    """Return the tile for `paged_attention_decode`, whose values have head_dim dimensions; rows is
    query_len * group.

    The rows are padded to a power of two of at least 16, the least that a tensor core takes.
    """
    block_m = max(16, 1 << (rows - 1).bit_length())
    num_warps = 4 if block_m <= 32 and head_dim <= 256 else 8
    if dtype == torch.float32:
        return TileConfig(block_m, 16, num_warps, 1)
    if head_dim > 256:
        # Two tiles in flight where a program has a multiprocessor for itself, or tiles are small.
        alone = compute_capability(device) in (90, 100) and block_m == 32
        small = of_latents and block_m == 16
        return TileConfig(block_m, 32, num_warps, 3 if alone or small else 2)
    if head_dim > 128:
        return TileConfig(block_m, 32, num_warps, 3)
    return TileConfig(block_m, 64, num_warps, 3)


class ProductConfig(NamedTuple):
    """One compiled shape of a product: rows, columns and depth of a tile, warps, stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def product_config(num_rows: int, dtype: torch.dtype) -> ProductConfig:
    """Return the tile for `grouped_product`. Its depth may be cut to fit a row's groups.

    The time of few rows is that of reading the weight: narrow tiles, and many of them in flight.
    """
    if dtype == torch.float32:
        return ProductConfig(16, 32, 64, 4, 1)
    if num_rows <= 16:
        return ProductConfig(16, 64, 128, 4, 4)
    if num_rows <= 64:
        return ProductConfig(32 if num_rows <= 32 else 64, 64, 64, 4, 4)
    return ProductConfig(128, 64, 64, 8, 3)


def product_parts(num_rows: int, blocks: int, steps: int, device: torch.device) -> int:
    """Return into how many parts `grouped_product` splits the depth, which has so many steps.

    With one tile of rows, so many that there are two programs for each multiprocessor, if each has
    four steps.
    """
    if num_rows > 64:
        return 1
    num_sms = 132
    if device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(8, 2 * num_sms // blocks, steps // 4))


class ChunkConfig(NamedTuple):
    """How a state passes through chunks: tokens of a chunk, columns of the state a program, warps
    and pipeline stages."""

    tokens: int
    columns: int
    num_warps: int
    num_stages: int


def chunk_config(key_pad: int, dtype: torch.dtype, device: torch.device) -> ChunkConfig:
    """Return how `chunked_recurrence` runs with keys of `key_pad` numbers, operands of `dtype`."""
    if dtype == torch.float32:
        return ChunkConfig(32, 16, 8, 1)
    capability = compute_capability(device)
    if 90 <= capability < 120:
        num_warps = 4 if capability == 90 and key_pad <= 128 else 8
        return ChunkConfig(64, 32, num_warps, 2 if key_pad <= 128 else 1)
    # Operands are in registers too. Only an A100 has shared memory for two chunks in flight.
    if key_pad <= 128:
        return ChunkConfig(64, 16, 4, 2 if capability == 80 else 1)
    return ChunkConfig(32, 32, 8, 1)


def expert_config(pairs_per_expert: float, dtype: torch.dtype) -> ProductConfig:
    """Return the tile for `run_experts`, whose products of one sum have twice as many columns.

    `pairs_per_expert` is the mean. The time of few is that of reading the weights; up to 16 need
    the least rows that a tensor core takes.
    """
    configs = expert_configs(dtype)
    if pairs_per_expert <= 16:
        return configs[0]
    return configs[min(1, len(configs) - 1)] if pairs_per_expert <= 64 else configs[-1]


def expert_configs(dtype: torch.dtype) -> list[ProductConfig]:
    """Return all tiles for `run_experts`. Those in flight fit the shared memory of every GPU from
    sm_80 on."""
    if dtype == torch.float32:
        return [ProductConfig(16, 32, 32, 4, 1)]
    return [
        ProductConfig(16, 32, 128, 4, 4),
        ProductConfig(64, 64, 64, 4, 3),
        ProductConfig(128, 64, 64, 8, 3),
    ]
