"""Test the script that counts the imports for docs/decisions.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/imports.py"
FILES = {
    "engine/__init__.py": "",
    "engine/words.py": "import json\n",
    "engine/cache/__init__.py": "",
    "engine/cache/pool.py": "from ..words import Word\nfrom . import index\n",
    "engine/cache/index.py": "def f():\n    from .pool import Pool\n",
    "engine/core/__init__.py": "",
    "engine/core/loop.py": "from ..cache.pool import Pool\nfrom ..cache import index\n",
}


def test_counts_of_a_small_checkout(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # loop → pool ⇄ index → words, of which pool and index are one level; core → cache → engine.
    assert "| engine | 5 | 3 | 1 | 2 | 3 | 0 |" in output.splitlines()
    assert "| server | 0 | 1 | 0 | 0 | 1 | 0 |" in output.splitlines()
