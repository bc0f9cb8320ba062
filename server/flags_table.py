"""Write the tables of flags in docs/api.md and docs/migrating.md from their declarations.

    python -m quire.server.flags_table docs/api.md docs/migrating.md

`make docs` runs it. It replaces the text between the markers of each table. A test asserts that the
tables are up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import get_args

from .cli import grouped_flags
from .foreign_flags import FOREIGN_FLAGS, Server
from .settings import Settings

END = "<!-- end of flags -->"


def flags_table() -> str:
    """Return the table in Markdown: a row for `--config`, then one for each flag by group."""
    rows = [("`--config`", "–", _sentence(Settings.model_fields["config"].description or ""))]
    for flag in grouped_flags():
        text = f"{flag.field.description} {flag.details}".strip()
        rows.append((f"`{flag.option}`", _shown(flag.default), _sentence(text)))
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def foreign_table(server: Server) -> str:
    """Return the table in Markdown of another server's flags, and what takes their place."""
    rows = [
        f"| `{each.flag}` | {each.answer} | {_sentence(_code(each.advice))} |"
        for each in FOREIGN_FLAGS
        if each.server == server
    ]
    return "\n".join([f"| flag of {server} | here | |", "|---|---|---|", *rows])


def begin(what: str) -> str:
    """Return the line that a table begins after: of "flags", or of "flags of" a server."""
    return f"<!-- {what}: written by `make docs` -->"


def updated(document: str) -> str:
    """Return the document with each table between its markers, in place of the text there."""
    tables = {begin("flags"): flags_table()}
    for server in get_args(Server):
        tables[begin(f"flags of {server}")] = foreign_table(server)
    if not any(marker in document for marker in tables):
        raise ValueError(f"the document lacks a line like {begin('flags')}")
    for marker, table in tables.items():
        if marker in document:
            before, _, rest = document.partition(marker)
            _, end, after = rest.partition(END)
            if not end:
                raise ValueError(f"the document lacks the line {END} after {marker}")
            document = f"{before}{marker}\n\n{table}\n\n{END}{after}"
    return document


def _code(text: str) -> str:
    """Mark flags, paths, names of fields and of the environment as code."""
    return re.sub(
        r"(?<![\w`])(--[a-z0-9-]+|/[a-z_]+|[a-z]+_[a-z_.]+|[A-Z]+_[A-Z_]+)", r"`\1`", text
    )


def _shown(default: str | None) -> str:
    if default is None:
        return "–"
    return default if default in ("on", "off") else f"`{default}`"


def _sentence(text: str) -> str:
    """Escape `|`, which would end the cell, and drop the last full stop, as other tables do."""
    return text.replace("|", "\\|").removesuffix(".")


def main() -> None:
    """Update the document that the command line names."""
    if len(sys.argv) < 2:
        sys.exit("flags_table: name the document to update, such as docs/api.md")
    for path in map(Path, sys.argv[1:]):
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
