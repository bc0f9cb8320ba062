"""Compile the kernels of a GPU run ahead, in many processes and without a GPU.

    PYTHONPATH=tests/types python benchmarks/gpu_cache.py --jobs 14 [--archive cache.tar.xz]

Fills Triton's cache (TRITON_CACHE_DIR, by default ~/.triton/cache), so that gpu.py spends its time
on measuring. A cache holds for one build of Triton only: with `--archive`, made with the Python and
the Triton of the GPU's machine, it can be carried there and unpacked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import gpu_checks
import gpu_sweep
import gpu_times
import torch
from gpu_common import Case
from gpu_shapes import SHAPES
from gpu_stub import stub_gpu
from triton.runtime.cache import triton_key

from quire.kernels.cuda.rms_norm import fused_add_rms_norm, rms_norm
from quire.kernels.cuda.rope_and_cache import rope_and_cache
from quire.kernels.cuda.sampling.best_tokens import best_tokens
from quire.kernels.cuda.silu_and_mul import silu_and_mul

BF16 = torch.bfloat16
CAPABILITY = 90
"""Of an H100 or H200."""


def launch_layer(shape: str) -> dict[str, object]:
    """Launch the small kernels of a model's layer. Its attention is among the cases that are
    timed."""
    config = SHAPES[shape]
    hidden, heads, dim = (config[f] for f in ("hidden_size", "num_attention_heads", "head_dim"))
    kv_heads = config["num_key_value_heads"]

    def make(*sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, dtype=BF16, device="meta")

    x, weight = make(33, hidden), make(hidden)
    for pdl in (False, True):
        rms_norm(x, weight, eps=1e-6, pdl=pdl)
        fused_add_rms_norm(x, make(33, hidden), weight, eps=1e-6, pdl=pdl)
        silu_and_mul(make(33, 2 * config["intermediate_size"]), pdl=pdl)
    query, key, value = make(33, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], 1)
    norm = make(dim) if config["model_type"] == "qwen3" else None
    cache = make(2, 64, kv_heads, 16, dim)
    # Factors are halves of the rows of a table; see engine/body/rotary_table.py.
    cos, sin = (part[:, dim // 2 :] for part in make(33, 2 * dim).split(dim, 1))
    for pdl in (False, True):
        rope_and_cache(
            query, key, value, *cache, torch.empty(33, dtype=torch.int64, device="meta"), cos, sin,
            query_weight=norm, key_weight=norm, rotary_dim=dim, out=query, pdl=pdl,
        )  # fmt: skip
    logits, ids = make(33, config["vocab_size"]), torch.empty(33, dtype=torch.int64, device="meta")
    best_tokens(logits, make(33), ids, ids.bool())
    return {}


def all_cases() -> list[Case]:
    """Return every case of the kernels' checks, times and sweeps, and a layer of each model."""
    layers = [
        Case(f"layer {shape}", lambda shape=shape: launch_layer(shape))
        for shape in list(SHAPES)[:2]
    ]
    return [
        *layers, *gpu_checks.cases(), *gpu_times.cases(), *gpu_sweep.decode_cases(),
        *gpu_sweep.extend_cases(),
    ]  # fmt: skip


def compile_cases(cases: Sequence[Case]) -> dict[str, str]:
    """Compile what these cases launch. Returns the error of each that failed, by name."""
    failures = {}
    with stub_gpu(CAPABILITY, compiles=True):
        for case in cases:
            try:
                case.run()
            except Exception as error:
                failures[case.name] = f"{type(error).__name__}: {error}"[:300]
    return failures


def cache_folder() -> Path:
    """Return the folder of Triton's cache."""
    return Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--only", type=re.compile, help="cases whose names this expression finds")
    parser.add_argument("--archive", type=Path, help="write the cache to this .tar.xz")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = [c for c in all_cases() if arguments.only is None or arguments.only.search(c.name)]
    if arguments.part is not None:
        failures = compile_cases(cases[arguments.part :: arguments.jobs])
        print(json.dumps(failures))
        return 0
    begun = time.monotonic()
    command = [sys.executable, *sys.argv, "--jobs", str(arguments.jobs), "--part"]
    parts = [
        subprocess.Popen([*command, str(part)], stdout=subprocess.PIPE, text=True)
        for part in range(arguments.jobs)
    ]
    outputs = [part.communicate()[0].splitlines() for part in parts]
    failures = {
        name: why for lines in outputs if lines for name, why in json.loads(lines[-1]).items()
    }
    broken = sum(part.returncode != 0 for part in parts)
    kernels = len(list(cache_folder().glob("*/*.cubin")))
    key = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    print(
        f"{kernels} kernels of {len(cases)} cases in {time.monotonic() - begun:.0f} s; "
        f"{len(failures)} cases and {broken} processes failed; Triton {key}"
    )
    for name, why in failures.items():
        print(f"  {name}: {why}")
    if arguments.archive is not None:
        with tarfile.open(arguments.archive, "w:xz") as archive:
            archive.add(cache_folder(), arcname="cache")
        print(f"{arguments.archive}: {arguments.archive.stat().st_size / 1e6:.1f} MB")
    return int(bool(failures or broken))


if __name__ == "__main__":
    sys.exit(main())
