"""The base of the formats in which each argument of a call stands between tags of its own."""

from __future__ import annotations

import json
from typing import ClassVar, NamedTuple

from .answer_parser import Malformed, Reader, Tools
from .schema_values import TEXT, Types, argument_types, value_as_json
from .tool_parser import ToolParser


class ParameterTags(NamedTuple):
    """How an argument is written: `before`, its name, each text of `between`, its value, `after`.

    White space may stand before each text of `between` but the first. `trim` says that the value
    stands on lines of its own.
    """

    before: str
    between: tuple[str, ...]
    after: str
    trim: bool


class ParameterCalls(ToolParser):
    """Reads the arguments of such a call. They are typed by the schema of the tool, and a value
    that can only be text is streamed as it comes."""

    parameter: ClassVar[ParameterTags]

    def __init__(self, tools: Tools, *, only_tagged: bool = False) -> None:
        super().__init__(tools, only_tagged=only_tagged)
        self._types: dict[tuple[str, str], Types] = {}
        """The types of arguments that have been read, by the names of tool and argument."""

    def _parameters(self, name: str, close: str) -> Reader[None]:
        """Read arguments up to the tag `close`, and emit the call `name` with them. The call begins
        with its first argument. Raises Malformed."""
        tags = self.parameter
        begun = False
        while True:
            # 1. End with the closing tag, or with the beginning of it that the text ends with.
            yield from self._skip_space()
            if (yield from self._take(close)) or self._breaks_off(close):
                break
            # 2. Read the name of the next argument, up to its value.
            yield from self._expect(tags.before)
            key = (yield from self._until(tags.between[0])).strip()
            for text in tags.between[1:]:
                yield from self._skip_space()
                yield from self._expect(text)
            # 3. Emit it. A value that breaks off leaves incomplete arguments.
            if not begun:
                self._begin_call(name)
            self._emit_arguments(f"{', ' if begun else '{'}{json.dumps(key, ensure_ascii=False)}: ")
            begun = True
            if (name, key) not in self._types:
                self._types[name, key] = argument_types(self._tools.get(name, {}), key)
            yield from self._value(self._types[name, key])
        if not begun:
            self._begin_call(name)
        self._emit_arguments("}" if begun else "{}")
        self._end_call()

    def _breaks_off(self, close: str) -> bool:
        """Take a tag that the text ends within, and return whether there is one."""
        if not self._ended:
            return False
        rest = self._text[self._at :]
        if not close.startswith(rest) or self.parameter.before.startswith(rest):
            return False
        self._at = len(self._text)
        return True

    def _value(self, types: Types) -> Reader[None]:
        """Read a value and the tag after it, and emit its JSON text. Raises Malformed if the text
        ends within."""
        tags = self.parameter
        if types == TEXT:
            self._emit_arguments('"')
            complete = yield from self._text_to(tags.after, self._emit_text, trim=tags.trim)
            if complete:
                self._emit_arguments('"')
        else:
            parts: list[str] = []
            complete = yield from self._text_to(tags.after, parts.append, trim=tags.trim)
            if complete:
                self._emit_arguments(value_as_json("".join(parts), types))
        if not complete:
            raise Malformed

    def _emit_text(self, text: str) -> None:
        """Emit a part of a string value."""
        self._emit_arguments(json.dumps(text, ensure_ascii=False)[1:-1])
