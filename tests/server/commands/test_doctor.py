"""`quire doctor`: each check can say ok and what is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.server import cli
from quire.server.commands import doctor_checks as checks
from quire.server.settings import Settings

CPU = checks._Torch(None, [], None)
GPU = checks._Torch("13.0", [("H1", 80 * checks.GIB, "9.0")], None)


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"QUIRE_{name.upper()}", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setattr(checks, "_ask_torch", lambda: CPU)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("QUIRE_PORT", str(port))
    yield


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = cli.main(["doctor", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] == (code == 0)
    return code, {check["name"]: check for check in said["checks"]}


def test_a_sound_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = report(capsys)
    assert code == 0
    names = ("torch", "triton", "transformers", "cpu", "memory", "open files", "hub cache", "port")
    assert all(found[name]["status"] in ("ok", "warn") for name in names)
    assert "quire" in found and found["would use"]["text"].startswith("the CPU in float32")


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 15 and all(line[:5].strip() in ("ok", "warn", "fail") for line in lines)


def test_wrong_settings_fail_and_unknown_ones_warn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIRE_MAX_NUM_SEQ", "1")
    monkeypatch.setenv("QUIRE_MAX_N", "none")
    code, found = report(capsys)
    assert code == 1
    assert found["settings"]["status"] == "fail" and "QUIRE_MAX_N" in found["settings"]["text"]
    assert "QUIRE_MAX_NUM_SEQS" in found["environment"]["text"]


def test_a_taken_port_names_who_has_it(served: str) -> None:
    port = int(served.rsplit(":", 1)[1])
    found = checks._port("127.0.0.1", port)
    assert found.status == "warn" and "a server that asks for a key" in found.text
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0)
        text = checks._port("127.0.0.1", other.getsockname()[1]).text
    assert "another program" in text
    assert checks._port("192.0.2.1", 80).status == "fail"


@pytest.mark.parametrize(
    ("torch", "driver", "status", "text"),
    [
        (CPU, False, "ok", "no NVIDIA GPU"),
        (CPU, True, "warn", "torch is a build for CPUs"),
        (checks._Torch("13.0", [], None), True, "warn", "torch sees no GPU"),
        (GPU, True, "ok", "H1 (80 GiB, sm_9.0)"),
        (checks._Torch(None, [], "torch cannot be used: x"), False, "fail", "cannot be used"),
    ],
)
def test_devices(
    torch: checks._Torch, driver: bool, status: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/x" if driver else None)
    if not driver and os.path.exists("/dev/nvidiactl"):
        pytest.skip("this machine has a driver")
    found = checks._device(torch)
    assert found.status == status and text in found.text


def test_the_choice_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "72 GiB" in checks._choice(GPU).text
    monkeypatch.setenv("QUIRE_DEVICE", "cpu")
    assert "QUIRE_DEVICE is cpu" in checks._choice(GPU).text
    monkeypatch.setenv("QUIRE_DEVICE", "cuda")
    assert checks._choice(CPU).status == "fail"


def test_a_broken_torch_is_told_by_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    broken = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: libx.so\n")
    monkeypatch.setattr(checks.subprocess, "run", lambda *_, **__: broken)
    assert checks._ask_torch().problem == "torch cannot be used: ImportError: libx.so"


def test_compilers_versions_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert checks._compiler(True).status == "fail" and checks._compiler(False).status == "ok"
    monkeypatch.setattr(checks, "version", lambda name: "0.0.1")
    (old,) = checks._packages(("torch",))
    assert old.status == "warn" and "tested with" in old.text
    monkeypatch.setattr(checks.os, "access", lambda *_: False)
    assert {check.status for check in checks._folders()} == {"warn", "fail"}
    monkeypatch.setattr(checks, "available_memory", lambda: 10)
    assert checks._memory().status == "warn"
    monkeypatch.setattr(checks.resource, "getrlimit", lambda _: (256, 1024))
    assert "ulimit -n 1024" in checks._files().text
