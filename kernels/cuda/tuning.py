"""Tile shapes by head_dim, dtype and rows: a table, so that nothing is tuned at run time.

The sweeps of `benchmarks/gpu.py` decide these lines; docs/kernels.md says what was measured.
"""

import functools
from typing import NamedTuple

import torch


class TileConfig(NamedTuple):
    """One compiled shape: rows (packed queries) and keys of a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    prefetch: bool = True
    """Read block ids one tile ahead."""


@functools.cache
def compute_capability(device: torch.device) -> int:
    """80 for A100, 90 for H100; the interpreter takes the tiles of 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def extend_config(
    head_dim: int, dtype: torch.dtype, max_rows: int, device: torch.device
) -> TileConfig:
    """The tile of `paged_attention_extend`; max_rows = max_query_len * group."""
    if dtype == torch.float32:
        return TileConfig(32, 16, 8, 1)  # no tensor cores: small enough not to spill
    block_m, num_warps = (64, 4) if max_rows <= 64 else (128, 8)
    # Without wgmma the operands stand in registers too, and larger tiles spill.
    wgmma = compute_capability(device) == 90
    if head_dim > 128:
        return TileConfig(block_m, 32, num_warps, 2) if wgmma else TileConfig(64, 32, 8, 2)
    return TileConfig(block_m, 64 if wgmma or head_dim <= 64 else 32, num_warps, 3)


def decode_config(head_dim: int, dtype: torch.dtype, rows: int) -> TileConfig:
    """The tile of `paged_attention_decode`; rows = query_len * group, padded to at least 16."""
    block_m = max(16, 1 << (rows - 1).bit_length())
    num_warps = 4 if block_m <= 32 else 8
    if dtype == torch.float32:
        return TileConfig(block_m, 16, num_warps, 1)
    if head_dim > 128:
        return TileConfig(block_m, 32, num_warps, 3)
    return TileConfig(block_m, 64, num_warps, 3)
