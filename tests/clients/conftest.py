"""One `quire serve` with the demo model per session, which all client tests talk to.

`test_*.py` need only the packages of the test extra and run with all other tests. `check_*.py` need
clients that are installed separately; `make clients` installs them and runs everything.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the server's address. In the end it must exit cleanly, without errors in its log."""
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [command("quire"), "serve", "--port", "0", "--api-key", KEY, "--log-format", "json"],
            stderr=stderr,
        )
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
