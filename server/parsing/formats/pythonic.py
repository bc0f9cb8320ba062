"""Calls that are written as in Python, `f(a=1, b="x")`: Llama 4, Gemma 3, OLMo 3, LFM2."""

from __future__ import annotations

from typing import ClassVar

from ..answer_parser import Reader
from ..call_shape import CallShape, ParameterShape
from ..python_calls import PythonCalls
from ..tool_format import ToolFormat


class PythonicParser(PythonCalls):
    """Reads `[f(a=1, b="x"), g()]`, with or without `<|python_start|>` tags.

    Without a tag a list is a call only if it names an offered tool. Arguments are not streamed; a
    call is emitted once its last parenthesis and what must follow have come.
    """

    tags: ClassVar[dict[str, str]] = {"<|python_start|>": "<|python_end|>", "[": ""}
    """The tag that ends calls, by the marker that begins them."""
    in_lines: ClassVar[bool] = False
    """Calls may stand one after the other, without a list around them."""
    markers: ClassVar[tuple[str, ...]] = ("<|python_start|>", "[")
    bare_markers: ClassVar[tuple[str, ...]] = ("[",)
    control_tokens: ClassVar[tuple[str, ...]] = ("<|python_start|>", "<|python_end|>")

    def _calls(self, marker: str) -> Reader[None]:
        bare = marker in self.bare_markers
        if not bare:
            yield from self._skip_space()
            if self.in_lines and (yield from self._peek()) != "[":
                yield from self._lines(self.tags[marker])
                return
            yield from self._expect("[")
        ended = False
        while not ended:
            yield from self._skip_space()
            name, arguments = yield from self._call(bare=bare)
            # A comma or the end of the list must follow; until then the text could still be an
            # ordinary list. A comma may come last.
            yield from self._skip_space()
            ended = yield from self._take("]")
            if not ended:
                yield from self._expect(",")
                yield from self._skip_space()
                ended = yield from self._take("]")
            self._emit_call(name, arguments)
        if not bare:
            yield from self._close(self.tags[marker])

    def _lines(self, closing: str) -> Reader[None]:
        """Read calls, one after the other, and the closing tag."""
        ended = False
        while not ended:
            self._emit_call(*(yield from self._call()))
            yield from self._skip_space()
            ended = yield from self._take_last(closing)
        self._end_call()

    def _emit_call(self, name: str, arguments: str) -> None:
        self._begin_call(name)
        self._emit_arguments(arguments)
        self._end_call()


class Gemma3Parser(PythonicParser):
    """Reads the same as a list by itself, or in a block of code that is marked `tool_code`, in
    which calls may stand one after the other, each within `print(…)`: Gemma 3."""

    tags = {"```tool_code": "```", "[": ""}
    in_lines = True
    markers = ("```tool_code", "[")
    control_tokens = ()


class Olmo3Parser(PythonicParser):
    """Reads `<function_calls>` and `</function_calls>` around calls, one a line: OLMo 3."""

    tags = {"<function_calls>": "</function_calls>"}
    in_lines = True
    markers = ("<function_calls>",)
    bare_markers = ()
    control_tokens = ("<function_calls>", "</function_calls>")


class Lfm2Parser(PythonicParser):
    """Reads `<|tool_call_start|>[…]<|tool_call_end|>`: LFM2."""

    tags = {"<|tool_call_start|>": "<|tool_call_end|>"}
    markers = ("<|tool_call_start|>",)
    bare_markers = ()
    control_tokens = ("<|tool_call_start|>", "<|tool_call_end|>")


_ARGUMENTS = ParameterShape("", "=", separator=", ", python=True)


def _pythonic(template: str) -> CallShape:
    tagged = "<|python_start|>" in template
    first, last = ("<|python_start|>[", "]<|python_end|>") if tagged else ("[", "]")
    return CallShape(first, "", "(", ")", ", ", last, _ARGUMENTS)


def _gemma3(template: str) -> CallShape:
    return CallShape("```tool_code\n", "", "(", ")", "\n", "\n```", _ARGUMENTS)


def _olmo3(template: str) -> CallShape:
    return CallShape("<function_calls>", "", "(", ")", "\n", "</function_calls>", _ARGUMENTS)


def _lfm2(template: str) -> CallShape:
    first, last = "<|tool_call_start|>[", "]<|tool_call_end|>"
    return CallShape(first, "", "(", ")", ", ", last, _ARGUMENTS)


FORMATS = (
    ToolFormat("gemma3", Gemma3Parser, _gemma3, signs=(("```tool_code",),)),
    ToolFormat("olmo3", Olmo3Parser, _olmo3, signs=(("<function_calls>",),)),
    ToolFormat("lfm2", Lfm2Parser, _lfm2, signs=(("<|tool_call_start|>",),)),
    ToolFormat(
        "pythonic",
        PythonicParser,
        _pythonic,
        signs=(("<|python_start|>",),),
        aliases=("llama4_pythonic",),
    ),
)
