"""Folders of servers that were killed while they loaded."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from quire.engine.process import private_folder as module
from quire.engine.process.private_folder import PREFIX, private_folder


def test_folders_of_killed_processes_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ("killed", "young", "files", "empty")
    folders = {name: tmp_path / f"{PREFIX}{name}" for name in names}
    for folder in folders.values():
        folder.mkdir()
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(folders["killed"] / "engine"))
    (folders["files"] / "notes").write_text("not ours")
    other = tmp_path / "quire-notes"
    other.mkdir()
    old = time.time() - 2 * module.MIN_AGE_SECONDS
    with private_folder() as living:
        for folder in (living, *folders.values(), other):
            if folder != folders["young"]:
                os.utime(folder, (old, old))
        with private_folder() as second:
            left = set(tmp_path.iterdir())
            assert left == {living, second, folders["young"], folders["files"], other}
            assert second.stat().st_mode & 0o077 == 0
    assert set(tmp_path.iterdir()) == {folders["young"], folders["files"], other}


def test_a_temporary_folder_with_a_long_path_is_replaced_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        with private_folder() as folder, socket.socket(socket.AF_UNIX) as end:
            assert folder.parent == Path(short)
            end.bind(str(folder / "engine"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    refusal = pytest.raises(OSError, match="is too long for the paths of sockets.*set TMPDIR")
    with refusal, private_folder():
        pass
    assert not list(long.iterdir())


def test_the_longest_path_that_is_taken_is_short_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = module.MAX_PATH - len(str(tmp_path)) - 1
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("y" * room)))
    Path(tempfile.gettempdir()).mkdir()
    with private_folder() as folder, socket.socket(socket.AF_UNIX) as end:
        assert folder.parent == Path(tempfile.gettempdir())
        end.bind(str(folder / "engine"))
        assert len(str(folder / "engine")) <= 107
