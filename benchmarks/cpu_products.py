"""Compare the speed of the CPU's packed matrix products with torch's.

    OMP_NUM_THREADS=1 taskset -c 1 python -P benchmarks/cpu_products.py [--turns 5]

For each dtype and shape, this reports the fastest of many calls of `run_product` (ours), of
F.linear, and of torch's private products with prepacked weights: mkldnn's `_linear_pointwise`, and
MKL's `_mkl_linear` for float32. They take turns on one thread. Times are in milliseconds. A ratio
is torch's time over ours: above 1, ours is faster. taskset keeps mkldnn from a second thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from quire.engine.devices.cpu.packed_linear import PackedLinear

Product = Callable[[], torch.Tensor]

SHAPES = [(384, 2304), (1152, 384), (2048, 2048), (2048, 8192)]
"""Pairs of in_features and out_features."""
ROWS = [1, 4, 16, 64, 256]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for depth, columns in SHAPES:
            for rows in ROWS:
                measure(dtype, depth, columns, rows, arguments.turns)


@torch.inference_mode()
def measure(dtype: torch.dtype, depth: int, columns: int, rows: int, turns: int) -> None:
    x = torch.randn(rows, depth).to(dtype)
    linear = nn.Linear(depth, columns, bias=False, dtype=dtype)
    functions = candidates(linear, x)
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(turns):
        for name, function in functions.items():
            best[name] = min(best[name], fastest(function))
    ours = best.pop("ours")
    others = "  ".join(
        f"{name} {seconds * 1e3:7.3f} ({seconds / ours:4.2f})" for name, seconds in best.items()
    )
    kind = str(dtype).removeprefix("torch.")
    print(
        f"{kind:9}{depth:5} x {columns:4}, {rows:3} rows: {ours * 1e3:7.3f}  {others}", flush=True
    )


def candidates(linear: nn.Linear, x: torch.Tensor) -> dict[str, Product]:
    weight, rows, ops = linear.weight.detach().clone(), len(x), torch.ops
    mkldnn = ops.mkldnn._reorder_linear_weight(weight, rows)
    functions: dict[str, Product] = {
        "F.linear": lambda: F.linear(x, weight),
        "mkldnn": lambda: ops.mkldnn._linear_pointwise(x, mkldnn, None, "none", [], ""),
    }
    if x.dtype == torch.float32:
        mkl = ops.mkl._mkl_reorder_linear_weight(weight, rows)
        functions["mkl"] = lambda: ops.mkl._mkl_linear(x, mkl, weight, None, rows)
    packed = PackedLinear(linear)
    functions["ours"] = lambda: packed(x)
    return functions


def fastest(function: Product) -> float:
    """Return the seconds of the fastest call within a tenth of a second."""
    function()  # compiles the function, and loads its weights into the caches
    best, end = float("inf"), time.perf_counter() + 0.1
    while time.perf_counter() < end:
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
    return best


if __name__ == "__main__":
    main()
