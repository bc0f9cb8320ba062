"""LoRA adapters by name: what the engine is told of one, and what names may look like."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

MAX_NAME = 128
"""Maximum characters of an adapter's name."""


class AdapterSource(NamedTuple):
    """A loaded or wanted adapter: the name that selects it, and the folder of its files."""

    name: str
    path: str

    @property
    def folder(self) -> Path:
        return Path(self.path).expanduser()


def name_problem(name: str) -> str | None:
    """Return what is wrong with an adapter's name, or None if nothing is."""
    if not name or len(name) > MAX_NAME:
        return f"the name of an adapter must have 1 to {MAX_NAME} characters"
    if not name.isprintable() or name != name.strip():
        return "the name of an adapter must be printable, without spaces around it"
    return None
