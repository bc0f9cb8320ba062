"""Test the script that counts the lengths for docs/decisions.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/lengths.py"
MODULE = '''\
"""A module."""

# A comment.
def f(x: int) -> int:
    """Return x."""

    def inner() -> int:
        return x  # not a comment line

    return inner()


class Public:
    text = """
# not a comment
"""

    def method(self) -> None: ...

    def _private(self) -> None: ...


class _Private:
    def method(self) -> None: ...
'''


def test_counts_of_a_small_checkout(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/module.py").write_text(MODULE)
    (tmp_path / "engine/__init__.py").write_text('"""A room."""\n')
    links = tmp_path / "tests/types"
    links.mkdir(parents=True)
    (links / "module.py").write_text(MODULE)
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.strip("| ").split(" | ") for line in output.splitlines()]
    rows = {name.strip(): cells for name, *cells in lines}
    # Functions of 7, 2, 1, 1 and 1 lines; of f, Public and Public.method only f has a docstring.
    assert rows["engine"] == [
        *("2 / 25", "1 / 24 / 24", "5", "1 / 7 / 7", "0 (0.0 %)", "33.3 %", "4.0 %", "Public 8"),
    ]
    assert rows["all"] == rows["engine"]
    assert rows["tests"][0] == "0 / 0"
