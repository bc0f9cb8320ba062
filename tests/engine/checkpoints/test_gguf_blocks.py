"""Test that blocks taken apart are exactly what gguf dequantises."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from quire.engine.body.grouped_linear import GroupedLinear
from quire.engine.checkpoints.gguf_blocks import KEPT_TYPES, keep_blocks, make_dense

from .gguf_files import encode


@pytest.mark.parametrize("name", sorted(KEPT_TYPES))
def test_kept_blocks_are_exact(name: str) -> None:
    kind = Type[name]
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(1))
    rows = encode(weight, kind)
    kept = keep_blocks(kind, rows)
    expected = torch.from_numpy(dequantize(rows, kind))
    assert kept.shape == (6, 512)
    assert torch.equal(kept.dense(), expected)
    assert expected.unique().numel() > 100
    assert torch.equal(make_dense(kind, rows, (6, 512)), expected)
    inputs = torch.randn(3, 512)
    product = GroupedLinear(kept, None, torch.float32)(inputs)
    torch.testing.assert_close(product, inputs @ expected.T)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_are_read_as_they_are(name: str) -> None:
    weight = torch.randn(4, 32)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
    read = make_dense(Type[name], encode(weight, Type[name]).view("uint8").reshape(4, -1), (4, 32))
    assert read.dtype == dtype
    assert torch.equal(read, weight.to(dtype))
