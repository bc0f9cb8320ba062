"""The calls of FunctionGemma and Gemma 4, whose strings stand between delimiters of their own."""

from __future__ import annotations

import json
from typing import ClassVar

from ..answer_parser import Malformed, Reader
from ..call_shape import CallShape, ParameterShape
from ..schema_values import ANY, Types, argument_types, value_as_json
from ..tool_format import ToolFormat
from ..tool_parser import ToolParser

_MAX_DEPTH = 64
"""Maximum lists and objects within each other."""
_MAX_BARE = 256
"""Maximum characters of a value without delimiters, such as a number."""


class FunctionGemmaParser(ToolParser):
    """Reads `<start_function_call>call:name{key:<escape>text<escape>,other:[1,2]}
    <end_function_call>`.

    Strings between delimiters are streamed as they come. A string may also stand in quotation
    marks, as in JSON.
    """

    closing: ClassVar[str] = "<end_function_call>"
    delimiter: ClassVar[str] = "<escape>"
    markers = ("<start_function_call>",)
    control_tokens = ("<start_function_call>", "<end_function_call>", "<escape>")

    def _calls(self, marker: str) -> Reader[None]:
        yield from self._skip_space()
        yield from self._expect("call:")
        name = (yield from self._until("{")).strip()
        self._begin_call(name)
        yield from self._object(argument_schema=name)
        self._end_call()
        yield from self._close(self.closing)

    def _object(self, depth: int = 0, argument_schema: str | None = None) -> Reader[None]:
        """Read members up to the brace that ends them, and emit an object. Members have the types
        of the arguments of the tool `argument_schema`, if one is given. Raises Malformed."""
        schema = self._tools.get(argument_schema or "", {})
        self._emit_arguments("{")
        first = True
        while not (yield from self._ends("}", first=first)):
            key = yield from self._key()
            lead = "" if first else ", "
            self._emit_arguments(f"{lead}{json.dumps(key, ensure_ascii=False)}: ")
            first = False
            types = argument_types(schema, key) if argument_schema else ANY
            yield from self._value(types, depth)
        self._emit_arguments("}")

    def _key(self) -> Reader[str]:
        """Read the name of a member, which may stand in quotation marks or delimiters. Raises
        Malformed."""
        if (yield from self._peek()) in ("'", '"'):
            key = yield from self._string()
            yield from self._skip_space()
            yield from self._expect(":")
            return key
        if (yield from self._take(self.delimiter)):
            key = yield from self._until(self.delimiter)
            yield from self._expect(":")
            return key
        return (yield from self._until(":")).strip()

    def _list(self, depth: int) -> Reader[None]:
        """Read items up to the bracket that ends them, and emit a list. Raises Malformed."""
        self._emit_arguments("[")
        first = True
        while not (yield from self._ends("]", first=first)):
            self._emit_arguments("" if first else ", ")
            first = False
            yield from self._value(ANY, depth)
        self._emit_arguments("]")

    def _ends(self, bracket: str, *, first: bool) -> Reader[bool]:
        """Take the bracket that ends an object or a list, or the comma before the next member, and
        return whether it has ended. Raises Malformed."""
        yield from self._skip_space()
        if (yield from self._take(bracket)):
            return True
        if first:
            return False
        yield from self._expect(",")
        yield from self._skip_space()
        if (yield from self._take(bracket)):  # after a comma that comes last
            return True
        if not (yield from self._peek()):
            raise Malformed
        return False

    def _value(self, types: Types, depth: int) -> Reader[None]:
        """Read a value and emit it. Raises Malformed."""
        yield from self._skip_space()
        if depth > _MAX_DEPTH:
            raise Malformed
        if (yield from self._take(self.delimiter)):
            self._emit_arguments('"')
            if not (yield from self._text_to(self.delimiter, self._emit_text)):
                raise Malformed
            self._emit_arguments('"')
        elif (yield from self._take("{")):
            yield from self._object(depth + 1)
        elif (yield from self._take("[")):
            yield from self._list(depth + 1)
        elif (yield from self._peek()) in ("'", '"'):
            yield from self._stream_arguments()
        else:
            bare = yield from self._bare()
            self._emit_arguments(value_as_json(bare, types))

    def _bare(self) -> Reader[str]:
        """Take a value without delimiters, up to the comma or bracket after it. Raises
        Malformed."""
        start = self._at - self._mark
        while (char := (yield from self._peek())) not in (",", "}", "]"):
            self._at += 1
            if not char or self._at - self._mark - start > _MAX_BARE:
                self._at = min(self._at, len(self._text))
                raise Malformed
        return self._text[self._mark + start : self._at].strip()

    def _emit_text(self, text: str) -> None:
        self._emit_arguments(json.dumps(text, ensure_ascii=False)[1:-1])


class Gemma4Parser(FunctionGemmaParser):
    """Reads `<|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>`."""

    closing = "<tool_call|>"
    delimiter = '<|"|>'
    markers = ("<|tool_call>",)
    control_tokens = ("<|tool_call>", "<tool_call|>", '<|"|>')


def _functiongemma(template: str) -> CallShape:
    text = ("<escape>", "<escape>", "")
    before, after = "<start_function_call>call:", "}<end_function_call>"
    return CallShape("", before, "{", after, "", "", ParameterShape("", ":", "", ",", text))


def _gemma4(template: str) -> CallShape:
    text = ('<|"|>', '<|"|>', "")
    before, after = "<|tool_call>call:", "}<tool_call|>"
    return CallShape("", before, "{", after, "", "", ParameterShape("", ":", "", ",", text))


FORMATS = (
    ToolFormat("gemma4", Gemma4Parser, _gemma4, signs=(("<|tool_call>",),)),
    ToolFormat(
        "functiongemma",
        FunctionGemmaParser,
        _functiongemma,
        signs=(("<start_function_call>",),),
    ),
)
