"""Write the table of flags in docs/api.md from the declarations of the flags.

    python -m quire.server.flags_table docs/api.md

`make docs` runs it. It replaces the text between the two markers. A test asserts that the table is
up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .cli import grouped_flags
from .settings import Settings

BEGIN = "<!-- flags: written by `make docs` -->"
END = "<!-- end of flags -->"


def flags_table() -> str:
    """Return the table in Markdown: a row for `--config`, then one for each flag by group."""
    rows = [("`--config`", "–", _sentence(Settings.model_fields["config"].description or ""))]
    for flag in grouped_flags():
        text = f"{flag.field.description} {flag.details}".strip()
        rows.append((f"`{flag.option}`", _shown(flag.default), _sentence(text)))
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def updated(document: str) -> str:
    """Return the document with the table between the markers, in place of the text there."""
    before, _, rest = document.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"the document lacks the line {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{flags_table()}\n\n{END}{after}"


def _shown(default: str | None) -> str:
    if default is None:
        return "–"
    return default if default in ("on", "off") else f"`{default}`"


def _sentence(text: str) -> str:
    """Escape `|`, which would end the cell, and drop the last full stop, as other tables do."""
    return text.replace("|", "\\|").removesuffix(".")


def main() -> None:
    """Update the document that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("flags_table: name the document to update, such as docs/api.md")
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
