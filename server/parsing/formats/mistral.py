"""Mistral's calls, of all generations of its tokenizer."""

from __future__ import annotations

import secrets
import string

from ..answer_parser import Reader
from ..call_shape import JSON_CALL, CallShape
from ..json_calls import JsonCalls
from ..tool_format import ToolFormat


class MistralParser(JsonCalls):
    """Reads `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and the formats since 2025, in which
    each call is `[TOOL_CALLS]name{…}` or `[TOOL_CALLS]name[CALL_ID]…[ARGS]{…}`."""

    markers = ("[TOOL_CALLS]",)
    control_tokens = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")

    def new_id(self) -> str:
        """Return nine letters and digits, the only form that these models' templates accept."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def _calls(self, marker: str) -> Reader[None]:
        yield from self._skip_space()
        if (yield from self._peek()) == "[":
            yield from self._call_list()
        else:
            yield from self._named_call()

    def _named_call(self) -> Reader[None]:
        name = yield from self._name()
        yield from self._skip_space()
        if (yield from self._take("[CALL_ID]")):
            yield from self._name()  # the model's own id, which is replaced by ours
        if (yield from self._take("[ARGS]")):
            yield from self._skip_space()
        yield from self._call_with(name)


def _shape(template: str) -> CallShape:
    if "[ARGS]" in template:
        return CallShape("", "[TOOL_CALLS]", "[ARGS]", "", "", "")
    return CallShape("[TOOL_CALLS][", *JSON_CALL, ", ", "]")


FORMATS = (ToolFormat("mistral", MistralParser, _shape, signs=(("[TOOL_CALLS]",),)),)
