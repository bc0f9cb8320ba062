"""Compare the kernels that move K and V with the reference.

Copies are exact; rotated values are within 1e-6 (float32), 1e-3 (float16) and 1e-2 (bfloat16, which
the interpreter truncates instead of rounding).
"""

from typing import Any

import pytest
import torch
from paged import relative_error

from quire.kernels import reference
from quire.kernels.cuda.copy_blocks import copy_blocks
from quire.kernels.cuda.reshape_and_cache import reshape_and_cache
from quire.kernels.cuda.rope_and_cache import rope_and_cache

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
SLOTS = [3, -1, 17, 40, -7, 39, 0]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads,dim,block_size", [(1, 32, 16), (3, 80, 16), (7, 256, 32)])
def test_reshape_and_cache(dtype: torch.dtype, heads: int, dim: int, block_size: int) -> None:
    key = torch.randn(heads, 7, dim).to(dtype).transpose(0, 1)
    value = torch.randn(7, 2 * heads, 2 * dim).to(dtype)[:, ::2, ::2]
    found = torch.zeros(2, 4, heads, block_size, dim, dtype=dtype)
    expected = found.clone()
    slots = torch.tensor(SLOTS)
    reshape_and_cache(key, value, *found, slots)
    reference.reshape_and_cache(key, value, *expected, slots)
    assert torch.equal(found, expected) and found.any()


def test_reshape_and_cache_converts_to_the_cache_dtype() -> None:
    key, value = torch.randn(2, 7, 2, 32)
    found = torch.zeros(2, 4, 2, 16, 32, dtype=torch.float16)
    expected = found.clone()
    reshape_and_cache(key, value, *found, torch.tensor(SLOTS))
    reference.reshape_and_cache(key, value, *expected, torch.tensor(SLOTS))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads,block_size,dim", [(1, 16, 16), (3, 32, 80)])
def test_copy_blocks(dtype: torch.dtype, heads: int, block_size: int, dim: int) -> None:
    found = torch.randn(3, 2, 6, heads, block_size, dim).to(dtype)
    expected = found.clone()
    sources, destinations = torch.tensor([1, 1, 4]), torch.tensor([0, 5, 2])
    copy_blocks(found, sources, destinations)
    reference.copy_blocks(expected, sources, destinations)
    assert torch.equal(found, expected)
    copy_blocks(found, sources[:0], destinations[:0])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rotary,dim", [(80, 80), (32, 64), (16, 16), (64, 256)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_rope_and_cache(dtype: torch.dtype, rotary: int, dim: int, norm: bool, pairs: bool) -> None:
    query, value = torch.randn(7, 7, dim).to(dtype), torch.randn(7, 3, dim).to(dtype)
    key = torch.randn(3, 7, dim).to(dtype).transpose(0, 1)
    angles = torch.randn(7, rotary // 2).repeat(1, 2)
    how: dict[str, Any] = {
        f"{name}_weight": torch.randn(dim) if norm else None for name in ("query", "key")
    }
    how["pairs"] = pairs
    slots = torch.tensor(SLOTS)
    found = torch.zeros(2, 4, 3, 16, dim, dtype=dtype)
    expected = found.double()
    out = torch.full_like(query, float("nan"))
    rope_and_cache(query, key, value, *found, slots, angles.cos(), angles.sin(), **how, out=out)
    wide = reference.rope_and_cache(
        query.double(), key.double(), value.double(), *expected, slots, angles.cos(), angles.sin(),
        **how,
    )  # fmt: skip
    assert relative_error(out, wide) < TOLERANCES[dtype]
    assert relative_error(found, expected) < TOLERANCES[dtype]
    assert torch.equal(found[1].double(), expected[1])
    halves = (angles[:, rotary // 2 :].cos(), angles[:, rotary // 2 :].sin())
    rope_and_cache(query, key, value, *found, slots, *halves, **how, rotary_dim=rotary, out=query)
    assert torch.equal(query, out)
