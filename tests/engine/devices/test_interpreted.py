"""Run tests/engine/devices/interpreted: the CUDA path, with its kernels under Triton's interpreter.

It takes a process of its own, as in tests/kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("interpreted")


def test_the_cuda_path_under_the_interpreter() -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
