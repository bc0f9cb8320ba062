"""Run tests/kernels/interpreted, each kernel against its oracle under Triton's interpreter.

The interpreter must be switched on before triton is first imported, and then nothing compiles any
more, so these tests get a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("interpreted")


def test_kernels_under_the_interpreter() -> None:
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
