"""The `openai` package for Node. openai.mjs holds the checks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .conftest import KEY, command

SCRIPT = Path(__file__).parent / "openai.mjs"


def test_openai_for_node(server: str) -> None:
    done = subprocess.run(
        [command("node"), "--test", "--test-reporter=spec", str(SCRIPT)],
        env=os.environ | {"OPENAI_BASE_URL": f"{server}/v1", "OPENAI_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass 8\n" in done.stdout and "skipped 0\n" in done.stdout, done.stdout
