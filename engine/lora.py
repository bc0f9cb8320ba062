"""LoRA adapters by name: what the engine is told of one, and what names may look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

MAX_NAME = 128
"""Maximum characters of an adapter's name."""


class AdapterSource(NamedTuple):
    """A loaded or wanted adapter: the name that selects it, the folder of its files and, once it is
    loaded, a hash of their content."""

    name: str
    path: str
    version: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.path).expanduser()


def adapter_key(name: str, version: str) -> str:
    """Return what tells the blocks that were computed with this version of an adapter from all
    others, on every machine alike. `version` is not empty."""
    return f"{name}\0{version}"  # no name has a character that is not printable


def read_sources(items: Sequence[str]) -> tuple[AdapterSource, ...]:
    """Return the adapters that are written as NAME=FOLDER. Raises ValueError if one is not, or if
    names are bad or equal."""
    sources: dict[str, AdapterSource] = {}
    for item in items:
        name, separator, path = item.partition("=")
        if not (separator and path):
            raise ValueError(f"{item!r} is not NAME=FOLDER")
        if (problem := name_problem(name)) is not None:
            raise ValueError(problem)
        if name in sources:
            raise ValueError(f"two adapters have the name {name!r}")
        sources[name] = AdapterSource(name, path)
    return tuple(sources.values())


def name_problem(name: str) -> str | None:
    """Return what is wrong with an adapter's name, or None if nothing is."""
    if not name or len(name) > MAX_NAME:
        return f"the name of an adapter must have 1 to {MAX_NAME} characters"
    if not name.isprintable() or name != name.strip():
        return "the name of an adapter must be printable, without spaces around it"
    return None
