"""Test the site's list of pages; `make site` builds the site and finds broken links."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs/site"
NOT_YET = {
    "reliability.md",
    "planning.md",
    "scaling-routing.md",
    "scaling-parallel.md",
    "SECURITY.md",
}
"""Pages that are listed so that they find their place when they are written."""


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run hooks.py without MkDocs, which the tests' environment need not have."""
    files = ModuleType("mkdocs.structure.files")
    files.File = None  # type: ignore[attr-defined]
    for name in ("mkdocs", "mkdocs.structure"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "mkdocs.structure.files", files)
    return runpy.run_path(str(FOLDER / "hooks.py"))


def _pages(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, dict):
            for inner in entry.values():
                yield from [inner] if isinstance(inner, str) else _pages(inner)
        else:
            yield entry


def test_listed_pages_exist(hooks: dict[str, Any]) -> None:
    config = yaml.safe_load((FOLDER / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(_pages(config["nav"]))
    assert len(listed) == len(set(listed))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    there |= {page for page, path in hooks["ADDED"].items() if (ROOT / path).is_file()}
    assert set(listed) - there <= NOT_YET


def test_missing_pages_are_left_out_and_new_ones_are_added(hooks: dict[str, Any]) -> None:
    nav: list[Any] = [{"Home": "a.md"}, {"Run": ["b.md", "missing.md"]}]
    hooks["_complete"](nav, {"a.md", "b.md", "new.md", "examples/x-py.md"})
    assert nav == [
        {"Home": "a.md"},
        {"Run": ["b.md"]},
        {"More": ["new.md"]},
        {"Programs": ["examples/x-py.md"]},
    ]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("see [a](api.md#errors)", "see [a](api.md#errors)"),
        ("see [the map](../ARCHITECTURE.md)", "see [the map](ARCHITECTURE.md)"),
        ("[`code`](../engine/errors.py) says", "`code` says"),
        ("[us](https://example.com/a)", "[us](https://example.com/a)"),
        ("    [kept](../engine/errors.py)", "    [kept](../engine/errors.py)"),
        ("text:\n- item\n  more\n- item", "text:\n\n- item\n  more\n- item"),
    ],
)
def test_links_and_lists_are_those_of_the_site(
    hooks: dict[str, Any], written: str, shown: str
) -> None:
    class Page:
        src_uri = "tuning.md"
        file: Any = None

    Page.file = Page
    names = ("tuning.md", "api.md", "ARCHITECTURE.md")
    files = [type("File", (), {"src_uri": name}) for name in names]
    assert hooks["on_page_markdown"](written, Page, None, files) == f"{shown}\n"
