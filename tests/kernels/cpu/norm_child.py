"""Normalise random rows in a process that has an empty cache of kernels, or a filled one.

    NUMBA_CACHE_DIR=folder python -P norm_child.py

Writes as JSON whether the kernel came from the cache, a digest of the bits of its output, and, if
it did not, the functions that were compiled for it.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

from quire.kernels.cpu.kernel import signature_of
from quire.kernels.cpu.norms import Norm, normalise
from quire.kernels.cpu.region import launch

LONGEST = 200
"""Rows of every length up to it go through all parts of the loops that LLVM makes."""


def _rows(rng: np.random.Generator, length: int) -> Norm:
    x, weights = (rng.standard_normal((count, length), dtype=np.float32) for count in (4, 1))
    epsilons, no_ids = np.full(1, 1e-5, np.float32), np.empty(0, np.int64)
    none = (np.empty((0, 1), np.float32), np.empty((0, 1), np.float32), np.empty(0, np.float32))
    return Norm(x, weights, epsilons, np.zeros_like(x), *none, no_ids, weights, np.float32(1))


def main() -> None:
    rng = np.random.default_rng(3)
    compiled = normalise.compile(signature_of(_rows(rng, 1)))
    bits = hashlib.sha256()
    for length in range(1, LONGEST + 1):
        norm = _rows(rng, length)
        launch(normalise, norm, 1, len(norm.x), 1)
        bits.update(norm.out.tobytes())
    loaded = bool(compiled.cache_hits)
    lines = [] if loaded else compiled.inspect_llvm().splitlines()
    functions = [line for line in lines if line.startswith("define ")]
    print(json.dumps({"loaded": loaded, "bits": bits.hexdigest(), "functions": functions}))


if __name__ == "__main__":
    main()
