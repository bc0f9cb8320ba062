"""Llama's calls as JSON objects without closing tags."""

from __future__ import annotations

from ..answer_parser import Reader
from ..call_shape import CallShape
from ..json_calls import JsonCalls
from ..tool_format import ToolFormat


class Llama3JsonParser(JsonCalls):
    """Reads `{"name": …, "parameters": {…}}`, several separated by `;`.

    `<|python_tag|>` may come before them. Without that tag an object is a call only if it names an
    offered tool, because a model may well answer in JSON.
    """

    markers = ("<|python_tag|>", "{")
    bare_markers = ("{",)
    control_tokens = ("<|python_tag|>",)

    def _calls(self, marker: str) -> Reader[None]:
        bare = marker == "{"
        if bare:
            self._at -= 1  # the marker is the object's own brace
        while True:
            yield from self._skip_space()
            yield from self._call_object(bare=bare)
            yield from self._skip_space()
            if not (yield from self._take(";")):
                break


def _shape(template: str) -> CallShape:
    return CallShape("", '{"name": "', '", "parameters": ', "}", "; ", "")


FORMATS = (
    ToolFormat(
        "llama3_json",
        Llama3JsonParser,
        _shape,
        # Llama 3.2 has no tag, but its template shows the object to write.
        signs=(
            ("<|python_tag|>",),
            ('{"name": ', '"parameters": ', "<|start_header_id|>"),
        ),
        aliases=("llama4_json",),
    ),
)
