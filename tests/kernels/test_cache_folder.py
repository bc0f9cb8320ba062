"""Where compiled kernels are kept if their usual place cannot be written."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from quire.kernels import cache_folder as module
from quire.kernels.cache_folder import PREFIX, cache_folder

from .cpu import norm_child

NOWHERE = "/proc/self/no-such-folder"
"""A folder that not even root can make."""


def test_the_first_folder_that_can_be_written_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    package = tmp_path / "package"
    package.mkdir()
    wanted = str(tmp_path / "wanted")
    assert cache_folder("n", wanted, package) == tmp_path / "wanted/n"
    assert cache_folder("n", "", package) == package / "__pycache__/n"
    assert cache_folder("n", "", Path(NOWHERE)) == tmp_path / "home/.cache/quire/n"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("n", "", Path(NOWHERE)) == tmp_path / "xdg/quire/n"
    assert not caplog.records


@pytest.mark.parametrize("wanted", ["", NOWHERE])
def test_without_one_a_temporary_folder_is_taken_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wanted: str,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", NOWHERE)
    atexit: list[object] = []
    monkeypatch.setattr(module.atexit, "register", lambda *call, **_: atexit.append(call))
    # Folders of processes that were killed are removed, and those in use are not.
    old = time.time() - 2 * module.MIN_AGE_SECONDS
    for name in ("killed", "used", "young"):
        (tmp_path / f"{PREFIX}{name}" / "n").mkdir(parents=True)
        if name != "young":
            os.utime(tmp_path / f"{PREFIX}{name}", (old, old))
    used = os.open(tmp_path / f"{PREFIX}used", os.O_RDONLY)
    fcntl.flock(used, fcntl.LOCK_EX)
    with caplog.at_level(logging.WARNING):
        folder = cache_folder("n", wanted, Path(NOWHERE))
    os.close(used)
    assert folder.parent.parent == tmp_path and folder.parent.stat().st_mode & 0o077 == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{PREFIX}used", f"{PREFIX}young", folder.parent.name),
    }
    assert len(atexit) == 1
    (record,) = caplog.records
    assert "set NUMBA_CACHE_DIR" in record.getMessage() and "\n" not in record.getMessage()


def test_kernels_run_and_nothing_is_left_behind(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-P", norm_child.__file__],
        env={"NUMBA_CACHE_DIR": NOWHERE, "HOME": NOWHERE, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["bits"]
    assert NOWHERE in result.stderr and not list(tmp_path.iterdir())
