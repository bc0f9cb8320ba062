"""One `quire serve` with the demo model per session, which all client tests talk to.

`test_*.py` need only the packages of the test extra and run with all other tests. `check_*.py` need
clients that are installed separately; `make clients` installs them and runs everything.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .scripted import ScriptedModel

MODEL = "quire-demo"
KEY = "clients-key"
START_TIMEOUT = 200.0
"""Seconds within which the server must be ready on a busy machine."""


def command(name: str) -> str:
    """Return the path of a command in this environment or PATH; fail the test if there is none."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.fail(f"{name} is not installed; `make clients` installs the clients")
    return found


def in_venv(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this folder in the environment of quire."""
    python = Path(command("quire")).with_name("python")
    return [str(python), "-P", str(Path(__file__).with_name("in_venv.py")), module, *arguments]


def free_port() -> int:
    """Return a port that no process listens on, for servers that cannot choose one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def _events(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        for event in _events(log):
            if event["event"] == "ready":
                return str(event["address"])
        time.sleep(0.1)
    pytest.fail(f"the server is not ready:\n{log.read_text(encoding='utf-8')}")


@contextmanager
def quire_serve(folder: Path, *arguments: str) -> Iterator[str]:
    """Run `quire serve` and yield its address; its log is a file in `folder`.

    In the end it must exit cleanly, without errors in its log.
    """
    log = folder / "log"
    flags = ["--port", "0", "--api-key", KEY, "--log-format", "json"]
    with log.open("wb") as stderr:
        process = subprocess.Popen([command("quire"), "serve", *arguments, *flags], stderr=stderr)
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert not [event for event in _events(log) if event["level"] in ("error", "critical")]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a server of the demo model."""
    with quire_serve(tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture(scope="session")
def _scripted_model() -> Iterator[ScriptedModel]:
    model = ScriptedModel(in_venv("scripted_server"))
    yield model
    model.close()


@pytest.fixture
def scripted(_scripted_model: ScriptedModel) -> ScriptedModel:
    """A scripted model that is served by a process of its own, with nothing to say yet."""
    _scripted_model.play()
    return _scripted_model
