"""The `openai` package for Node. openai.mjs holds the checks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .conftest import KEY, command
from .examples import FOLDER, output_of

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


def test_the_example_streams_a_chat(server: str, tmp_path: Path) -> None:
    # Node looks for packages beside the program, as its reader has them.
    program = tmp_path / "chat.mjs"
    program.write_bytes((FOLDER / "chat.mjs").read_bytes())
    (tmp_path / "node_modules").symlink_to(SCRIPT.parent / "node_modules")
    assert output_of(str(program), server) == "12 + 30 = 42\n"
