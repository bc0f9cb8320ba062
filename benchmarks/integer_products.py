"""Measure products in integers: how fast one core reads weights of 4 and 8 bits, and multiplies.

    OMP_NUM_THREADS=1 taskset -c 1 python -P benchmarks/integer_products.py [--depth 576 2048]
    python -P benchmarks/integer_products.py --threads 2

One row reads 96 MB of weights from memory, 6 and 16 rows do the same, and 96 rows have 1 MB of
them, which stays in the cache. Reported are 10^9 products a second and for one row GB/s: the best
of several turns of all kinds, of CPU time with one thread and of the time that passes with several.
`int8` and `int4` are what --quantization makes; `Q4_0` and `Q4_1` are groups of 32 with a scale of
16 bits, and a minimum, as GGUF files have them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from quire.engine.body.grouped_linear import GroupedWeight
from quire.engine.devices.cpu.memory import in_large_pages
from quire.engine.devices.cpu.packing import pack_weight, rounded
from quire.kernels.cpu.integer.products import IntegerWeight
from quire.kernels.cpu.panels import PANEL_COLUMNS
from quire.kernels.cpu.products import count_few, count_items, make_quantised, make_tiles
from quire.kernels.cpu.region import run_calls

MEASURES = ((1, 96), (6, 96), (16, 96), (96, 1))
"""Rows of x, and MB of weights."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, nargs="*", default=[576, 1536, 2048, 4096, 8192])
    parser.add_argument("--kinds", nargs="*", default=["int8", "int4", "Q4_0", "Q4_1"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for depth in arguments.depth:
        measure(depth, arguments.kinds, arguments.turns, arguments.threads)


def measure(depth: int, kinds: list[str], turns: int, threads: int) -> None:
    made = {
        (kind, rows): make_product(kind, depth, rows, size, threads)
        for kind in kinds
        for rows, size in MEASURES
    }
    best = dict.fromkeys(made, float("inf"))
    for _ in range(turns):
        for key, (run, _, _) in made.items():
            best[key] = min(best[key], run())
    for kind in kinds:
        parts = []
        for rows, _ in MEASURES:
            _, weights, size = made[kind, rows]
            seconds = best[kind, rows]
            parts.append(f"{rows:3} rows {rows * weights / seconds / 1e9:6.1f} G/s")
            if rows == 1:
                parts.append(f"({size / seconds / 1e9:4.1f} GB/s)")
        print(f"depth {depth:5}  {kind:5}", *parts, flush=True)


def make_product(
    kind: str, depth: int, rows: int, megabytes: int, threads: int
) -> tuple[Callable[[], float], int, int]:
    """Return a function that runs a product and returns its seconds (of CPU time, if it has one
    thread), the number of its weights, and their bytes."""
    one = make_weight(kind, depth)
    repeats = max(1, (megabytes << 20) // one.num_bytes)
    weight = one._replace(
        data=_repeated(one.data, repeats),
        units=_repeated(one.units, repeats),
        factors=_repeated(one.factors, repeats),
        bias=_repeated(one.bias, repeats),
    )
    x = np.random.default_rng(0).standard_normal((rows, depth), dtype=np.float32)
    out = np.empty((rows, len(weight.bias)), np.float32)
    room, tiles = make_quantised(rows, weight.depth, weight.num_groups), make_tiles(threads)
    quantise = weight.quantise(x, room, tiles)
    assert quantise is not None
    run_calls([(quantise, count_few(rows))], rows, 1)
    call = weight.multiply(x, room, out, tiles, False)
    items = count_items(weight.num_panels, rows)
    clock = time.thread_time if threads == 1 else time.perf_counter

    def run() -> float:
        begin = clock()
        run_calls([(call, items)], rows, threads)
        return clock() - begin

    run()
    return run, len(weight.bias) * depth, weight.num_bytes


def make_weight(kind: str, depth: int) -> IntegerWeight:
    """Return a weight of some columns."""
    weight = torch.randn(8 * PANEL_COLUMNS, depth)
    made = rounded(weight, kind if kind.startswith("int") else "int4")
    assert isinstance(made, GroupedWeight)
    if kind.startswith("Q"):
        scale = torch.rand_like(made.scale).half().float()
        minimum = -8 * scale if kind == "Q4_0" else torch.rand_like(scale).half().float()
        made = made._replace(scale=scale, minimum=minimum)
    packed = pack_weight(made, None)
    assert isinstance(packed, IntegerWeight)
    return packed


def _repeated(array: np.ndarray, repeats: int) -> np.ndarray:  # type: ignore[type-arg]
    """Return an array so many times, in memory of large pages."""
    tensor = torch.from_numpy(array)
    return in_large_pages(tensor.repeat(repeats, *[1] * (tensor.ndim - 1)))


if __name__ == "__main__":
    main()
