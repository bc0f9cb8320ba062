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
    """Return the tile for `paged_attention_extend`; max_rows is max_query_len * group."""
    if dtype == torch.float32:
        return TileConfig(32, 16, 8, 1)  # no tensor cores: small enough not to spill
    block_m, num_warps = (64, 4) if max_rows <= 64 else (128, 8)
    # Without wgmma the operands are in registers too, and larger tiles spill.
    wgmma = compute_capability(device) == 90
    if head_dim > 128:
        return TileConfig(block_m, 32, num_warps, 2) if wgmma else TileConfig(64, 32, 8, 2)
    return TileConfig(block_m, 64 if wgmma or head_dim <= 64 else 32, num_warps, 3)


def decode_config(head_dim: int, dtype: torch.dtype, rows: int) -> TileConfig:
    """Return the tile for `paged_attention_decode`; rows is query_len * group.

    The rows are padded to a power of two of at least 16, the least that a tensor core takes.
    """
    block_m = max(16, 1 << (rows - 1).bit_length())
    num_warps = 4 if block_m <= 32 else 8
    if dtype == torch.float32:
        return TileConfig(block_m, 16, num_warps, 1)
    if head_dim > 128:
        return TileConfig(block_m, 32, num_warps, 3)
    return TileConfig(block_m, 64, num_warps, 3)
