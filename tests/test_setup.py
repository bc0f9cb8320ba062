"""`make setup` takes torch's build for CPUs if there is no GPU, and falls back without a word."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in *--index-url*) echo "no route to host" >&2; exit $REACHES;; esac
"""


def run(tmp_path: Path, *, reaches: bool, has_gpu: bool = False) -> tuple[list[str], str]:
    """Run the recipe with a pip that only writes down what it is asked for."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs/constraints.txt", tmp_path / "configs")
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    programs = ["sh", "uname", "touch", "echo", "true"] + ["nvidia-smi"] * has_gpu
    (tmp_path / "path").mkdir()
    for name in programs:
        (tmp_path / "path" / name).symlink_to(shutil.which(name) or shutil.which("true") or "")
    pip = commands / "pip"
    pip.write_text(PIP)
    pip.chmod(0o755)
    environment = {
        "PATH": str(tmp_path / "path"),
        "LOG": str(tmp_path / "log"),
        "REACHES": "0" if reaches else "1",
    }
    result = subprocess.run(
        [make, "setup", "PYTHON=true"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "no route" not in result.stdout + result.stderr
    return (tmp_path / "log").read_text().splitlines(), result.stdout


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has a GPU")
@pytest.mark.parametrize("reaches", [True, False])
def test_without_a_gpu_torch_is_the_build_for_cpus_if_its_index_answers(
    tmp_path: Path, reaches: bool
) -> None:
    asked, said = run(tmp_path, reaches=reaches)
    torch = [line for line in asked if line.endswith(" torch")]
    assert "whl/cpu" in torch[0] and "--retries 0" in torch[0]
    assert len(torch) == (1 if reaches else 2) and "whl/cpu" not in torch[-1] * (not reaches)
    assert ("the build for CPUs" in said) == reaches
    assert asked[-1].endswith("--editable .[test]")


def test_with_a_gpu_torch_comes_from_the_configured_index(tmp_path: Path) -> None:
    asked, _ = run(tmp_path, reaches=True, has_gpu=True)
    assert not any("--index-url" in line for line in asked)
    assert any(line.endswith(" torch") for line in asked)
