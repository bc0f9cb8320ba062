"""The page in a real Chromium. page.mjs holds the checks; `make test-web` runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ...test_end_to_end import Server

SCRIPT = Path(__file__).parent / "page.mjs"
SMALL_POOL = ("--num-gpu-blocks-override", "192", "--max-model-len", "1024")
"""Flags with which the tour can fill the pool."""


def command(*names: str) -> str:
    """Return the path of the first of these commands that exists."""
    found = next(filter(None, map(shutil.which, names)), None)
    assert found, f"none of {', '.join(names)} is installed"
    return found


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server, Server]]:
    keys = ("--api-key", "client", "--admin-api-key", "boss")
    several = ("--data-parallel-size", "2", "--num-threads", "1")
    with (
        Server(*SMALL_POOL) as unlocked,
        Server(*SMALL_POOL, *keys) as locked,
        Server(*SMALL_POOL, *several) as two,
    ):
        yield unlocked, locked, two


@pytest.mark.timeout(600)
def test_the_page_in_chromium(servers: tuple[Server, Server, Server]) -> None:
    open_server, locked, two = servers
    done = subprocess.run(
        [command("node"), "--test", "--test-reporter=spec", str(SCRIPT)],
        env=os.environ
        | {
            "QUIRE_URL": f"{open_server.address}/",
            "QUIRE_LOCKED_URL": f"{locked.address}/",
            "QUIRE_TWO_URL": f"{two.address}/",
            "CHROMIUM": command("chromium", "chromium-browser", "google-chrome"),
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped 0\n" in done.stdout, done.stdout
