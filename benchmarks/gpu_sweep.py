"""Time one tile shape after another, to find the best for kernels/cuda/tuning.py."""

from __future__ import annotations

import functools
import itertools

from gpu_common import LLAMA_8B, QWEN_06B, Case
from gpu_times import (
    BF16,
    E4M3,
    SAMPLED,
    time_decode,
    time_extend,
    time_sampling,
    time_shared,
)

from quire.kernels.cuda.tuning import TileConfig


def _tag(config: TileConfig) -> str:
    m, n, warps, stages, prefetch, in_place = config
    return f"m{m} n{n} w{warps} s{stages} p{int(prefetch)}" + ("" if in_place else " i0")


def decode_cases() -> list[Case]:
    """Return cases of tiles on 1 GB of K and V, splits at batch 1, larger blocks, rarer tiles."""
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
    fp8 = functools.partial(time_decode, dtype=E4M3)
    for tile in [tiles[0], tiles[0]._replace(in_place=False), *tiles[1:7]]:
        call = functools.partial(fp8, LLAMA_8B, 16, (4096,) * 64, tile)
        found.append(Case(f"decode fp8 64x4096 b16 {_tag(tile)}", call))
    found += _cascade_cases() + _sampling_cases()
    add_tiles(tiles[14:], "64x4096 b16", LLAMA_8B, 16, (4096,) * 64)
    add_tiles(tiles[7:14], "64x4096 b64", LLAMA_8B, 64, (4096,) * 64)
    return found


def _cascade_cases() -> list[Case]:
    tiles = [
        TileConfig(block_m, block_n, num_warps, num_stages)
        for (block_m, num_warps), block_n, num_stages in itertools.product(
            ((128, 8), (64, 4)), (64, 128, 32), (3, 2)
        )
    ]
    return [
        Case(
            f"shared cascade 64x4096+128 {_tag(tile)}",
            functools.partial(time_shared, LLAMA_8B, 64, 4096, 128, True, BF16, tile),
        )
        for tile in tiles
    ]


def _sampling_cases() -> list[Case]:
    """Return cases of a full batch, and of one row, whose program has an SM of its own."""
    return [
        Case(
            f"sample top_p {rows}x151936 n{block} s{search} w{warps}",
            functools.partial(
                time_sampling, 151_936, rows, SAMPLED["top_p"], True, (block, search, warps)
            ),
        )
        for rows in (256, 1)
        for (block, warps), search in itertools.product(
            ((4096, 16), (4096, 8), (8192, 16), (8192, 32), (2048, 8)), (512, 1024)
        )
    ]


def extend_cases() -> list[Case]:
    """Return cases of tiles on an 8k prompt at blocks of 16, 64 and 128, and 16 prompts of 512."""
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
