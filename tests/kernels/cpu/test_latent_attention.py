"""Compare attention to latents on the CPU with plain torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from quire.engine.devices.cpu.attention import CpuPlanner
from quire.engine.devices.cpu.packed_linear import PackedHeads
from quire.kernels import reference
from quire.kernels.cpu.arrays import as_array
from quire.kernels.cpu.attention import TILE_ROWS, Batch
from quire.kernels.cpu.latent.attention import (
    Latents,
    attend_latents,
    count_parts,
    store_latent,
)
from quire.kernels.cpu.panels import PANEL_COLUMNS
from quire.kernels.cpu.region import launch

from ..paged import PagedInputs, paged_inputs

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Shape(NamedTuple):
    heads: int
    rank: int
    rope_dim: int


SHAPES = [Shape(20, 512, 64), Shape(4, 20, 8), Shape(128, 64, 16), Shape(40, 48, 32)]
QUERIES, LENGTHS = [1, 1, 1, 5, 70, 1], [1, 64, 200, 5, 131, 129]


def inputs(shape: Shape, dtype: torch.dtype, cache_dtype: torch.dtype) -> PagedInputs:
    made = paged_inputs(
        QUERIES,
        LENGTHS,
        num_heads=shape.heads,
        num_kv_heads=1,
        head_dim=shape.rank + shape.rope_dim,
        block_size=16,
        dtype=cache_dtype,
    )
    made.query.mul_(2)  # so that a few keys weigh much more than the others
    return PagedInputs(**vars(made) | {"query": made.query.to(dtype)})


def run(made: PagedInputs, rank: int, num_threads: int = 1) -> torch.Tensor:
    """Attend to what the cache holds: every token's slot is none."""
    tokens, heads, width = made.query.shape
    starts, lengths = made.query_start_loc.numpy(), made.seq_lens.numpy()
    decodes = int(np.argmax(np.append(np.diff(starts) != 1, True)))
    cache = made.key_cache[None]
    plan = CpuPlanner(heads, cache[None]).cut(starts, lengths, made.block_table[:decodes].numpy())
    out = torch.full((tokens, heads, rank), torch.nan, dtype=made.query.dtype)
    attend_latents(
        as_array(made.query),
        np.zeros((tokens, width), np.float32),
        np.full(tokens, -1),
        as_array(cache),
        Batch(
            made.block_table.numpy(), starts, lengths, plan.tiles, plan.members, plan.tile_queries
        ),
        made.scale,
        num_threads,
        as_array(out),
    )
    return out


def expected(made: PagedInputs, rank: int) -> torch.Tensor:
    query = made.query.double()
    return reference.paged_attention_extend(
        query,
        made.key_cache.double(),
        made.key_cache[..., :rank].double(),
        made.block_table,
        made.query_start_loc,
        made.seq_lens,
        scale=made.scale,
        max_query_len=max(QUERIES),
        out=query.new_empty((*query.shape[:2], rank)),
    ).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_latents_equal_plain_torch(
    shape: Shape, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    made = inputs(shape, dtype, cache_dtype)
    out, tolerance = run(made, shape.rank), TOLERANCE[dtype]
    torch.testing.assert_close(
        out.float(), expected(made, shape.rank), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_others_or_on_its_chunk(shape: Shape) -> None:
    made = inputs(shape, torch.float32, torch.float16)
    whole = run(made, shape.rank)
    for num_threads in (2, 5):  # heads are cut into more parts
        assert torch.equal(run(made, shape.rank, num_threads), whole)
    for sequence, length in enumerate(LENGTHS):
        begin, end = made.query_start_loc[sequence : sequence + 2].tolist()
        for count in {end - begin, 1, (end - begin + 1) // 2}:  # the last queries of it, alone
            alone = PagedInputs(
                made.query[end - count : end],
                made.key_cache,
                made.value_cache,
                made.block_table[sequence : sequence + 1],
                torch.tensor([0, count], dtype=torch.int32),
                torch.tensor([length], dtype=torch.int32),
                made.scale,
            )
            assert torch.equal(run(alone, shape.rank), whole[end - count : end])


def test_decodes_that_share_a_prefix_have_the_same_bits() -> None:
    shape = Shape(16, 48, 16)
    made = paged_inputs(
        [1] * 5,
        [150 + i for i in range(5)],
        num_heads=16,
        num_kv_heads=1,
        head_dim=64,
        block_size=16,
    )
    made.block_table[:, :8] = made.block_table[:1, :8]  # 128 keys
    together = run(made, shape.rank)
    for row in range(5):
        alone = PagedInputs(
            made.query[row : row + 1],
            made.key_cache,
            made.value_cache,
            made.block_table[row : row + 1],
            torch.tensor([0, 1], dtype=torch.int32),
            made.seq_lens[row : row + 1],
            made.scale,
        )
        assert torch.equal(run(alone, shape.rank), together[row : row + 1])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_latents_go_to_their_slots(dtype: torch.dtype) -> None:
    latents = torch.randn(4, 28, generator=torch.Generator().manual_seed(0))
    cache = torch.zeros(1, 3, 1, 16, 28, dtype=dtype)
    slots, kept = torch.tensor([17, -1, 0, 47]), torch.tensor([0, 2, 3])
    launch(store_latent, Latents(as_array(latents), slots.numpy(), as_array(cache)), 4, 4, 1)
    lines = cache.view(-1, 28)
    assert torch.equal(lines[slots[kept]], latents[kept].to(dtype))
    lines[slots[kept]] = 0
    assert not lines.any()


@pytest.mark.parametrize(
    ("heads", "queries", "tiles", "threads", "parts"),
    [
        (20, 1, 1, 1, 1),
        (20, 1, 1, 4, 4),
        (20, 2, 8, 4, 1),
        (128, 1, 8, 4, 4),
        (7, 1, 1, 2, 7),
        (4, 1, 1, 64, 4),
        (1, 48, 1, 1, 1),
    ],
)
def test_heads_are_cut_into_parts(
    heads: int, queries: int, tiles: int, threads: int, parts: int
) -> None:
    assert count_parts(heads, queries, tiles, threads) == parts
    assert heads % parts == 0 and heads // parts * queries <= TILE_ROWS


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "depth", "columns"), [(3, 12, 20), (2, 33, PANEL_COLUMNS)])
def test_products_of_each_head(heads: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(heads, columns, depth, generator=generator).to(dtype)
    x = torch.randn(heads, 101, depth, generator=generator).to(dtype)
    product = PackedHeads(weight)
    found, tolerance = product(x), TOLERANCE[dtype]
    assert found.dtype == dtype and found.shape == (heads, 101, columns)
    wanted = torch.bmm(x.double(), weight.double().mT).float()
    torch.testing.assert_close(found.float(), wanted, atol=tolerance, rtol=tolerance)
    for token in (0, 50, 100):
        assert torch.equal(product(x[:, token : token + 1]), found[:, token : token + 1])
