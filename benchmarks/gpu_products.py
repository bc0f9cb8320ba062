"""Check and time the product with weights of 4 and 8 bits, and torch's float8 product."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from gpu_attention_checks import E4M3, verdict
from gpu_common import DEVICE, Record, time_graph

from quire.engine.body.grouped_linear import GroupedWeight
from quire.engine.devices.cuda.layers.kernels import TRITON
from quire.engine.devices.cuda.layers.products import multiply_float8
from quire.kernels import reference
from quire.kernels.cuda.grouped_product import grouped_product

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))
from paged import relative_error  # noqa: E402

BF16 = torch.bfloat16


def random_weight(kind: str, rows: int, depth: int, group: int) -> GroupedWeight:
    """Return a weight of "int4", "int8" or "float8" numbers."""
    if kind == "int4":
        quants = torch.randint(0, 256, (rows, depth // 2), device=DEVICE).to(torch.uint8)
    elif kind == "int8":
        quants = torch.randint(-128, 128, (rows, depth), device=DEVICE).to(torch.int8)
    else:
        quants = (torch.randn(rows, depth, device=DEVICE) * 20).to(E4M3)
    scale = torch.rand(rows, depth // group, device=DEVICE) * 0.01 + 0.01
    minimum = -8 * scale if kind == "int4" else None
    return GroupedWeight(quants, scale, minimum, 4 if kind == "int4" else 8, group)


def check_product(
    dtype: torch.dtype, kind: str, num_rows: int, rows: int, depth: int, group: int
) -> Record:
    """Check the kernel against float64, with W rounded to the dtype as the kernel does."""
    weight = random_weight(kind, rows, depth, group)
    x = torch.randn(num_rows, depth, device=DEVICE).to(dtype)
    bias = torch.randn(rows, device=DEVICE).to(dtype)
    parts = (weight.quants, weight.scale, weight.minimum)
    found = grouped_product(x, *parts, bias=bias)
    wide = reference.grouped_product(x.double(), *parts, bias=bias.double())
    return verdict(dtype, relative_error(found, wide))


def check_float8(num_rows: int, rows: int, depth: int) -> Record:
    """Check torch's product against float64 of the same rounded inputs."""
    weight = random_weight("float8", rows, depth, depth)
    x = torch.randn(num_rows, depth, device=DEVICE, dtype=BF16)
    scale = x.float().abs().amax(dim=1, keepdim=True) / 448
    rounded = (x.float() / scale).to(E4M3).double() * scale
    wide = rounded @ weight.dense().double().T
    return verdict(BF16, relative_error(multiply_float8(TRITON, x, weight, None), wide))


def time_product(kind: str, num_rows: int, rows: int, depth: int) -> Record:
    """Time a product of bfloat16 rows: groups of 128; "float8 torch" with a scale a row, and
    "dense" as torch multiplies bfloat16. Several weights take turns, so that no cache holds one."""
    count = max(2, int(4e8 // (rows * depth)))
    x = torch.randn(num_rows, depth, device=DEVICE, dtype=BF16)
    if kind == "dense":
        dense = torch.randn(count, rows, depth, device=DEVICE, dtype=BF16)
        calls = [functools.partial(torch.nn.functional.linear, x, one) for one in dense]
        size = 2 * rows * depth
    else:
        group = depth if kind == "float8 torch" else 128
        weights = [random_weight(kind.split()[0], rows, depth, group) for _ in range(count)]
        size = weights[0].num_bytes
        calls = [
            functools.partial(multiply_float8, TRITON, x, one, None)
            if kind == "float8 torch"
            else functools.partial(grouped_product, x, one.quants, one.scale, one.minimum)
            for one in weights
        ]
    seconds = time_graph(calls)
    return {
        "us": seconds * 1e6,
        "gb_s": size / seconds / 1e9,
        "tflop_s": 2 * num_rows * rows * depth / seconds / 1e12,
    }
