"""The calls of DeepSeek V3, R1 and V3.1."""

from __future__ import annotations

from ..answer_parser import Reader
from ..call_shape import CallShape
from ..tool_format import ToolFormat
from ..tool_parser import ToolParser


class DeepSeekV3Parser(ToolParser):
    """Reads the calls after `<｜tool▁calls▁begin｜>`, each between its own pair of tags.

    A call is `function<｜tool▁sep｜>name` and the arguments in a block of code (V3, R1), or
    `name<｜tool▁sep｜>{…}` (V3.1).
    """

    _CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    _SEPARATOR, _END = "<｜tool▁sep｜>", "<｜tool▁calls▁end｜>"
    markers = ("<｜tool▁calls▁begin｜>",)
    control_tokens = (*markers, _CALL, _CALL_END, _SEPARATOR, _END)

    def _calls(self, marker: str) -> Reader[None]:
        yield from self._skip_space()
        yield from self._expect(self._CALL)
        while True:
            yield from self._call()
            yield from self._skip_space()
            if not (yield from self._take(self._CALL)):
                break
        yield from self._close(self._END)

    def _call(self) -> Reader[None]:
        name = yield from self._name()
        yield from self._expect(self._SEPARATOR)
        in_block = name == "function" and (yield from self._peek()) not in ("{", '"', "")
        if in_block:
            name = yield from self._name()
            yield from self._skip_space()
            yield from self._expect("```json")
            yield from self._skip_space()
        yield from self._call_with(name)
        if in_block:
            yield from self._close("```")
        yield from self._close(self._CALL_END)


def _shape(template: str) -> CallShape:
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call, sep, call_end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    if "```json" in template:
        return CallShape(
            begin, f"{call}function{sep}", "\n```json\n", f"\n```{call_end}", "\n", end
        )
    return CallShape(begin, call, sep, call_end, "", end)


FORMATS = (
    ToolFormat(
        "deepseek_v3",
        DeepSeekV3Parser,
        _shape,
        signs=((DeepSeekV3Parser.markers[0],),),
        aliases=("deepseek_v31",),
    ),
)
