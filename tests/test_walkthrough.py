"""Test that each excerpt of docs/walkthrough.md is found in the file that it names."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
WALKTHROUGH = ROOT / "docs/walkthrough.md"
LEFT_OUT = "…"
"""A line of an excerpt that stands for lines left out."""


class Excerpt(NamedTuple):
    path: str
    lines: list[str]


def _excerpts() -> list[Excerpt]:
    text = WALKTHROUGH.read_text(encoding="utf-8")
    blocks = re.findall(r"^([^\n]+)\n+```python\n(.*?)^```$", text, re.M | re.S)
    found = []
    for before, block in blocks:
        link = re.fullmatch(r"\[`([\w/.]+)`\]\(\.\./([\w/.]+)\)", before)
        assert link and link[1] == link[2], f"no file is named before:\n{block}"
        found.append(Excerpt(link[1], block.splitlines()))
    return found


EXCERPTS = _excerpts()


def _pieces(lines: list[str]) -> list[str]:
    """Yield the runs of lines between those that are left out."""
    pieces: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == LEFT_OUT:
            pieces.append([])
        else:
            pieces[-1].append(line)
    return ["\n".join(piece) for piece in pieces if piece]


def _find(piece: str, text: str) -> int:
    """Return where a piece ends in a file, at any indentation, or -1 if it is not there."""
    wanted = dedent(piece).splitlines()
    lines = text.splitlines()
    for start in range(len(lines) - len(wanted) + 1):
        found = lines[start : start + len(wanted)]
        if dedent("\n".join(found)).splitlines() == wanted:
            return sum(len(line) + 1 for line in lines[: start + len(wanted)])
    return -1


@pytest.mark.parametrize("excerpt", EXCERPTS, ids=lambda excerpt: excerpt.path)
def test_excerpt_is_found_in_its_file(excerpt: Excerpt) -> None:
    text = (ROOT / excerpt.path).read_text(encoding="utf-8")
    for piece in _pieces(excerpt.lines):
        end = _find(piece, text)
        assert end >= 0, f"not in {excerpt.path}, or not in this order:\n{piece}"
        text = text[end:]


def test_excerpts_are_few_and_short() -> None:
    assert 8 <= len(EXCERPTS) <= 15
    assert all(3 <= len(excerpt.lines) <= 12 for excerpt in EXCERPTS)
