"""The calls of Kimi K2."""

from __future__ import annotations

import re

from ..answer_parser import Reader
from ..call_shape import NUMBER, CallShape
from ..tool_format import ToolFormat
from ..tool_parser import ToolParser

_CALL, _ARGUMENTS, _CALL_END = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
_BEGIN, _END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_ID = re.compile(r"(?:functions\.)?(.+?)(:[0-9]+)?")


class KimiK2Parser(ToolParser):
    """Reads `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{…}<|tool_call_end|>`,
    once or more within a section.

    `functions.name:0` becomes the id of the call, since the model's template shows ids to the
    model, and it knows them in this form only.
    """

    markers = (_BEGIN,)
    control_tokens = (_BEGIN, _CALL, _ARGUMENTS, _CALL_END, _END)

    def _calls(self, marker: str) -> Reader[None]:
        yield from self._skip_space()
        yield from self._expect(_CALL)
        while True:
            yield from self._skip_space()
            id = yield from self._name()
            yield from self._skip_space()
            yield from self._expect(_ARGUMENTS)
            yield from self._skip_space()
            match = _ID.fullmatch(id)
            name = match[1] if match else id
            yield from self._call_with(name, id if match and match[2] else None)
            yield from self._close(_CALL_END)
            yield from self._skip_space()
            if not (yield from self._take(_CALL)):
                break
        yield from self._close(_END)


def _shape(template: str) -> CallShape:
    before, between = f"{_CALL}functions.", f":{NUMBER}{_ARGUMENTS}"
    return CallShape(_BEGIN, before, between, _CALL_END, "", _END)


FORMATS = (ToolFormat("kimi_k2", KimiK2Parser, _shape, signs=((_BEGIN,),)),)
