"""Reads the input of a custom tool out of a call's arguments, `{"input": "…"}`, while they come."""

from __future__ import annotations

import json
import re

from ..requests.tool_choice import custom_input

_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_MAX_HEAD = 64
"""Characters within which the arguments must match _HEAD, for their input to be streamed."""
_CHARACTERS = re.compile(r'(?:[^"\\]|\\(?:[^u]|u[0-9a-fA-F]{4}))*', re.DOTALL)
_HALF_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")
"""The first half of a surrogate pair at the end."""


class CustomInput:
    """The input of one call. All results of `feed` and `finish` add up to it."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False
        self._ended = False

    def feed(self, arguments: str) -> str:
        """Append a piece of the arguments' JSON, and return the input that it makes certain."""
        if self._ended:
            return ""
        self._held += arguments
        if not self._begun:
            head = _HEAD.match(self._held, 0, _MAX_HEAD)
            if head is None:
                return ""
            self._begun, self._held = True, self._held[head.end() :]
        match = _CHARACTERS.match(self._held)
        assert match is not None  # it may be empty
        end = match.end()
        self._ended = self._held.startswith('"', end)
        if not self._ended and (half := _HALF_PAIR.search(self._held, 0, end)):
            end = half.start()
        text, self._held = self._held[:end], self._held[end:]
        return _decoded(text)

    def finish(self) -> str:
        """Return the rest of the input."""
        return "" if self._begun else custom_input(self._held)


def _decoded(text: str) -> str:
    """Return the characters that the inside of a JSON string stands for."""
    decoded: str = json.loads(f'"{text}"', strict=False)
    # Half of a surrogate pair by itself is no character.
    return decoded.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
