"""Finds stop strings in a text that comes in pieces.

A stop string may contain control tokens that the text does not show. So the text in which it is
looked for has a mark in the place of each hidden token, and the stop string has the same marks:

    stop string   END<|im_end|>  ─▶  END◆           shown   The END
    tokens        The END <|im_end|>                searched  The END◆

A mark is a lone surrogate, which no decoded text contains. A stop string without marks is looked
for in the text without them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_FIRST_MARK = 0xDC00
_OTHER = "\ud800"
"""The mark of a hidden token that is in no stop string."""
_MARKS = re.compile("[\ud800-\udfff]")


class StopStrings:
    """Looks for the stop strings of one choice. `found` is the one that was found, or None."""

    __slots__ = ("_held", "_include", "_longest", "_marked", "_marks", "_stops", "found")

    def __init__(
        self, stops: Sequence[str], hidden: Mapping[int, str], *, include_stop: bool
    ) -> None:
        """`hidden` maps the tokens that are not shown to their spellings."""
        self._stops = tuple(stops)
        self._longest = max(map(len, stops)) - 1
        self._include = include_stop
        self._marks, self._marked = _with_marks(stops, hidden)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Return the text that is now certain: up to the stop string that is complete first. If
        there is none, the longest tail that may be the beginning of one is held back."""
        text = self._held + text
        shown, places = _places(text) if self._marked else (text, None)
        first: tuple[int, int, str] | None = None
        for stop in self._stops:
            at = shown.find(stop)
            if at >= 0:
                end = at + len(stop)
                if places is not None:
                    at, end = places[at], places[end - 1] + 1
                if first is None or end < first[0]:
                    first = (end, at, stop)
        for marked, stop in self._marked:
            at = text.find(marked)
            if at >= 0 and (first is None or at + len(marked) < first[0]):
                first = (at + len(marked), at, stop)
        if first is not None:
            _, at, self.found = first
            self._held = ""
            return _shown(text[:at]) + (self.found if self._include else "")
        tail = _tail(shown, self._stops, self._longest)
        keep = len(text) - tail
        if places is not None:
            keep = places[len(shown) - tail] if tail else keep
            stops = [marked for marked, _ in self._marked]
            keep = min(keep, len(text) - _tail(text, stops, self._longest))
        self._held = text[keep:]
        return text[:keep] if places is None else _shown(text[:keep])

    def feed_hidden(self, token_id: int) -> str:
        """Do as `feed` for a token that is not shown."""
        if not self._marked:
            return ""
        return self.feed(self._marks.get(token_id, _OTHER))

    def finish(self) -> str:
        """Return the text that is held back, since no more comes."""
        rest, self._held = _shown(self._held), ""
        return rest


def _with_marks(
    stops: Sequence[str], hidden: Mapping[int, str]
) -> tuple[dict[int, str], list[tuple[str, str]]]:
    """Return the marks of the hidden tokens that stop strings spell, and each such stop string with
    its marks and as it is."""
    used = {text for text in hidden.values() if text and any(text in stop for stop in stops)}
    if not used:
        return {}, []
    by_length = sorted(used, key=len, reverse=True)  # a spelling may begin with another one
    marks = {text: chr(_FIRST_MARK + number) for number, text in enumerate(by_length)}
    pattern = re.compile("|".join(map(re.escape, by_length)))
    marked = [(pattern.sub(lambda match: marks[match.group()], stop), stop) for stop in stops]
    return (
        {token_id: marks[text] for token_id, text in hidden.items() if text in used},
        [(text, stop) for text, stop in marked if text != stop],
    )


def _shown(text: str) -> str:
    return _MARKS.sub("", text)


def _places(text: str) -> tuple[str, Sequence[int]]:
    """Return the text without marks, and the offset in `text` of each of its characters."""
    if text.isascii() or not _MARKS.search(text):
        return text, range(len(text))
    places = [index for index, character in enumerate(text) if not _MARKS.match(character)]
    return "".join(text[index] for index in places), places


def _tail(text: str, stops: Sequence[str], longest: int) -> int:
    """Return the length of the longest tail of `text`, of at most `longest` characters, that is the
    beginning of one of `stops`."""
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0
