"""Tile shapes tried one after another, so that kernels/tuning.py can hold the best of them."""

from __future__ import annotations

import functools
import itertools

from gpu_common import LLAMA_8B, QWEN_06B, Case
from gpu_times import time_decode, time_extend

from quire.kernels.tuning import TileConfig


def _tag(config: TileConfig) -> str:
    m, n, warps, stages, prefetch = config
    return f"m{m} n{n} w{warps} s{stages} p{int(prefetch)}"


def decode_cases() -> list[Case]:
    """Tiles on 1 GB of K and V, splits at batch 1, then larger blocks, then rarer tiles."""
    found: list[Case] = []
    tiles = [
        TileConfig(16, block_n, num_warps, num_stages, prefetch)
        for (num_stages, prefetch), (block_n, num_warps) in itertools.product(
            ((3, True), (4, True), (2, True), (3, False), (5, False), (6, True)),
            ((64, 4), (32, 4), (128, 4), (64, 2), (128, 8), (32, 2), (32, 1)),
        )
    ]

    def add_tiles(some: list[TileConfig], name: str, *batch: object) -> None:
        for tile in some:
            call = functools.partial(time_decode, *batch, tile)  # type: ignore[arg-type]
            found.append(Case(f"decode {name} {_tag(tile)}", call))

    add_tiles(tiles[:14], "64x4096 b16", LLAMA_8B, 16, (4096,) * 64)
    splits = list(itertools.product((4, 2, 8), (256, 128, 64)))
    for length in (1024, 8192, 32768):
        for per_sm, chunk in splits:
            call = functools.partial(time_decode, LLAMA_8B, 16, (length,), None, per_sm, chunk)
            found.append(Case(f"decode 1x{length} b16 c{per_sm} chunk{chunk}", call))
    add_tiles(tiles[:7], "64x4096 b64", LLAMA_8B, 64, (4096,) * 64)
    add_tiles(tiles[:7], "qwen 256x1024 b16", QWEN_06B, 16, (1024,) * 256)
    add_tiles(tiles[14:], "64x4096 b16", LLAMA_8B, 16, (4096,) * 64)
    add_tiles(tiles[7:14], "64x4096 b64", LLAMA_8B, 64, (4096,) * 64)
    return found


def extend_cases() -> list[Case]:
    """All tiles on an 8k prompt at blocks of 16, 64 and 128, then on 16 prompts of 512."""
    found = []
    tiles = [
        TileConfig(block_m, block_n, num_warps, num_stages, prefetch)
        for (block_m, num_warps), (num_stages, prefetch), block_n in itertools.product(
            ((128, 8), (64, 4), (128, 4)),
            ((2, True), (3, True), (3, False), (4, True), (5, False)),
            (64, 128, 32),
        )
        if not (block_n == 128 and num_stages > 3)
    ]
    for block_size in (16, 64, 128):
        for tile in tiles if block_size == 16 else tiles[:12]:
            call = functools.partial(time_extend, LLAMA_8B, block_size, 8192, 8192, 1, tile)
            found.append(Case(f"extend 8k b{block_size} {_tag(tile)}", call))
    for tile in tiles[:26]:
        call = functools.partial(time_extend, LLAMA_8B, 16, 512, 512, 16, tile)
        found.append(Case(f"extend 16x512 b16 {_tag(tile)}", call))
    return found
