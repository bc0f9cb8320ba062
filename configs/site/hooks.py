"""Makes the site of documents that are written for GitHub.

It adds the documents outside of docs/, drops links to source files, which are not part of the site,
and writes lists as Python-Markdown wants them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
ADDED = {
    "ARCHITECTURE.md": "ARCHITECTURE.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "RESULTS.md": "benchmarks/RESULTS.md",
    "icon.svg": "server/web/icon.svg",
}
"""Page of the site → its file in the repository, if that is there."""
PROGRAMS = (".py", ".sh", ".mjs")
"""Files of docs/ that are shown as pages, since a browser would not."""

_SOURCES = {page: ROOT / path for page, path in ADDED.items() if (ROOT / path).is_file()}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_ITEM = re.compile(r"\s*([-*]|\d+\.) ")


def on_files(files: Any, config: Any) -> Any:
    """Add the documents outside of docs/ and the programs, then list every page."""
    for page, path in _SOURCES.items():
        files.append(File.generated(config, page, content=path.read_bytes()))
    for program in [file for file in files if file.src_uri.endswith(PROGRAMS)]:
        text = Path(program.abs_src_path).read_text(encoding="utf-8")
        kind = {".py": "python", ".sh": "sh", ".mjs": "js"}[Path(program.src_uri).suffix]
        name = posixpath.basename(program.src_uri)
        page = f"# {name}\n\n```{kind}\n{text}```\n"
        files.remove(program)
        files.append(File.generated(config, _page_of(program.src_uri), content=page))
    _complete(config.nav, {file.src_uri for file in files if file.src_uri.endswith(".md")})
    return files


def _page_of(program: str) -> str:
    """Return the page that shows a program."""
    return program.replace(".", "-") + ".md"


def _complete(nav: list[Any], pages: set[str]) -> None:
    """Drop entries whose page is not there, and add a section of the pages that have none."""
    listed: set[str] = set()

    def keep(entries: list[Any]) -> list[Any]:
        kept = []
        for entry in entries:
            if isinstance(entry, dict):
                ((title, inner),) = entry.items()
                inner = keep(inner) if isinstance(inner, list) else inner
                listed.update([inner] if isinstance(inner, str) else [])
                kept.append({title: inner})
            elif entry in pages:
                listed.add(entry)
                kept.append(entry)
        return kept

    nav[:] = keep(nav)
    others = sorted(pages - listed)
    programs = [page for page in others if page.startswith("examples/")]
    if others := [page for page in others if page not in programs]:
        nav.append({"More": others})
    nav.append({"Programs": programs})


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a document with the links and lists of the site."""
    source = _SOURCES.get(page.file.src_uri, ROOT / "docs" / page.file.src_uri)
    pages = {file.src_uri for file in files}
    lines: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        fenced ^= line.lstrip().startswith("```")
        is_code = fenced or (line.startswith("    ") and not _ITEM.match(line))
        if not is_code:
            line = _LINK.sub(lambda link: _relinked(link, source, page, pages), line)
            before = lines[-1] if lines else ""
            begins = before.strip() and not before.startswith("  ") and not _ITEM.match(before)
            if begins and _ITEM.match(line):
                lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _relinked(link: re.Match[str], source: Path, page: Any, pages: set[str]) -> str:
    """Return a link to a page of the site, or its text alone if the target is not one."""
    image, text, target, anchor = link[1], link[2], link[3], link[4] or ""
    if "://" in target or not target:
        return link[0]
    path = (source.parent / target).resolve()
    by_source = {file: name for name, file in _SOURCES.items()}
    found = by_source.get(path)
    if found is None and path.is_relative_to(ROOT / "docs"):
        found = path.relative_to(ROOT / "docs").as_posix()
        found = _page_of(found) if found.endswith(PROGRAMS) else found
    if path == ROOT / "README.md":
        found = "index.md"
    if found not in pages:
        return text
    here = posixpath.dirname(page.file.src_uri)
    return f"{image}[{text}]({posixpath.relpath(found, here or '.')}{anchor})"
