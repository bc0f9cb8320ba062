"""Test the memory of the engine process after its start."""

from __future__ import annotations

import subprocess
import sys

SETTLES = """
import gc, psutil
from quire.engine.process.heap import settle

freed, kept = [], []
for _ in range(400):  # pages that are kept alternate with pages that are freed
    freed.append(bytearray(100_000))
    kept.append(bytearray(10_000))
freed.clear()
before = psutil.Process().memory_info().rss
settle()
assert before - psutil.Process().memory_info().rss > 20_000_000, before
assert gc.get_freeze_count() > 1000
"""

NO_TRITON = """
from quire.engine.devices.cpu.first_start import leave_triton_out

leave_triton_out()
from torch.utils._triton import has_triton_package

assert not has_triton_package()
"""


def _run(script: str) -> None:
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=60)


def test_memory_freed_after_loading_returns_to_the_system() -> None:
    _run(SETTLES)


def test_an_engine_on_the_cpu_sees_no_triton() -> None:
    _run(NO_TRITON)
