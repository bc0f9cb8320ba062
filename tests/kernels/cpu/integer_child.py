"""Compute products in integers, in a process whose environment says what the processor has.

    python -P integer_child.py PATH LANES INPUT OUTPUT

INPUT holds what test_integer_products.py saved; OUTPUT gets the products and the quantised rows,
for one thread and for two, which must agree.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from quire.engine.body.grouped_linear import GroupedWeight
from quire.engine.devices.cpu.packing import pack_weight
from quire.kernels.cpu.integer.dots import PATH
from quire.kernels.cpu.numbers import LANES
from quire.kernels.cpu.products import count_few, make_quantised, make_tiles, run_product
from quire.kernels.cpu.region import launch


def main() -> None:
    path, lanes, source, target = sys.argv[1:]
    assert (path, lanes) == (PATH, str(LANES)), (PATH, LANES)
    given, found = np.load(source), {}
    x = given["x"]
    for bits in (4, 8):
        parts = [torch.from_numpy(given[f"{name}{bits}"]) for name in ("quants", "scale", "least")]
        weight = GroupedWeight(*parts, bits, 32)
        packed = pack_weight(weight, None)
        outs = []
        for threads in (1, 2):
            out = np.empty((len(x), weight.shape[0]), np.float32)
            run_product(packed, x, len(x), out, threads)
            outs.append(out)
        assert np.array_equal(*outs)
        found[f"out{bits}"] = outs[0]
    room, tiles = make_quantised(len(x), packed.depth, packed.num_groups), make_tiles(1)
    call = packed.quantise(x, room, tiles)
    assert call is not None
    launch(*call, count_few(len(x)), len(x), 1)
    np.savez(target, **found, **room._asdict())


main()
