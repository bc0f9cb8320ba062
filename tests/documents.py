"""The documents, and how their tables are read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Yield every table as its rows, each of which maps columns to cells."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        lines = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.splitlines()
        ]
        yield [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def code(cell: str) -> str:
    """Return the content of a cell that is one code span."""
    match = re.fullmatch(r"`([^`]*)`", cell)
    assert match, f"not a code span: {cell}"
    return match[1]
