"""What each format of calls shows of itself, so that all formats are tested alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Calls = list[tuple[str, str]]
"""Names, and arguments as JSON texts."""


class Quirk(NamedTuple):
    """A text that models write in some format, and what it holds."""

    text: str
    content: str | None
    calls: Calls


class FormatSamples(NamedTuple):
    """The samples of one format."""

    format: str
    call: Callable[[str, dict[str, Any]], str]
    """Writes a call as the model does."""
    frame: Callable[[Sequence[str]], str] = "\n".join
    """Writes what stands around calls and between them."""
    quirks: tuple[Quirk, ...] = ()
    no_calls: tuple[str, ...] = ()
    """Texts that begin like a call and are none, so that they are content."""
    hostile: tuple[str, ...] = ()
    """Long texts that must not take more than linear time."""


NESTED: dict[str, Any] = {
    "text": "a\n\tb",
    "place": {"name": "Ulm", "at": [1.5, -2, {"deep": [None, True, {}]}]},
    "tags": ["x", "y z"],
}
ODD = "Zürich 🎉 \"quoted\" and 'so' \\ {[(,)]} 100% <b> : ; = # é"
"""Text with characters that mean something in some format."""
SPECIMENS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "one": [("get_weather", {"city": "Oslo", "days": [1, 2.5], "hourly": False})],
    "parallel": [
        ("get_weather", {"city": "Oslo"}),
        ("note", {"text": "pack a coat", "level": -3, "urgent": True}),
        ("get_weather", {"city": "Rome"}),
    ],
    "unicode": [("note", {"text": ODD, "ratio": 0.25})],
    "nested": [("note", NESTED)],
    "empty": [("f", {})],
    "null": [("note", {"text": "", "level": None, "kind": "to do"})],
    "unknown": [("no.such-tool", {"a": "b"})],
}
"""Calls that every format must be able to write."""
