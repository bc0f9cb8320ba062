"""The programs of docs/examples, as their readers run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .conftest import KEY, command

FOLDER = Path(__file__).resolve().parents[2] / "docs/examples"
RUNNERS = {".sh": "sh", ".mjs": "node", ".py": sys.executable}


def output_of(name: str, server: str, **environment: str) -> str:
    """Run an example against a server; return what it prints. It must print no errors."""
    done = subprocess.run(
        [command(RUNNERS[Path(name).suffix]), str(FOLDER / name)],
        env=os.environ | {"OPENAI_BASE_URL": f"{server}/v1", "OPENAI_API_KEY": KEY} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout
