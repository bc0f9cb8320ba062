"""Answers in a format that the model's tokenizer describes by a response template.

transformers' parser reads them (server/templates/response_template.py), and this file turns its
events into ours:

    region_open    a part of the message begins: `content`, `reasoning_content`, `tool_calls`, …
    region_chunk   more of its text
    region_close   it has ended, and its value is known

Text is passed on as it comes, without the white space around a part if the template strips it. Two
parts of one kind are separated by a line break, or by what the template joins them with. A call is
emitted when it has ended. A part that transformers cannot read, such as a call that breaks off, is
content, and so is all text after it.

transformers loses the events of a piece of text in which it finds an error, so it gets one
character at a time. Then every cutting gives the same message, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ...templates.response_template import ResponseTemplate
from ..answer_parser import TOOL_NAME, AnswerParser, Reader, Tools
from ..message_events import ContentText, ReasoningText
from ..tool_format import ToolFormat

_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = "tool_calls"
_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RuntimeError)
"""Errors that transformers' parser raises on text that does not fit the template."""


class ResponseTemplateParser(AnswerParser):
    """Turns an answer into events, as a tokenizer's response template describes."""

    markers = ()

    def __init__(
        self,
        tools: Tools,
        *,
        only_tagged: bool = False,
        template: ResponseTemplate,
        prompt_end: str = "",
    ) -> None:
        super().__init__(tools, only_tagged=only_tagged)
        self._fields = template.fields
        self._theirs = template.parser(prompt_end, tools)
        self._failed = False
        self._field = ""
        """The part of the message that the text is in."""
        self._raw: list[str] = []
        """The text of a part whose value shows at its end."""
        self._space = ""
        """White space that ends the part, unless more text comes."""
        self._is_fresh = True
        """No text of this part has been emitted."""
        self._seen: set[str] = set()
        """The parts that have had text."""
        # The prompt may have begun a part; its text belongs to the prompt.
        self._read(self._theirs.initial_events)
        self._raw.clear()
        self._space = ""
        self._take_events()

    def _parse(self) -> Reader[None]:
        while True:
            for char in self._text[self._mark :]:
                self._step(char)
            self._mark = self._at = len(self._text)
            if self._ended:
                break
            yield
        if not self._failed:
            try:
                self._read(self._theirs.finalize()[1])
            except _ERRORS:
                self._fail()

    def _step(self, char: str) -> None:
        if self._failed:
            self._events.append(ContentText(char))
            return
        try:
            self._read(self._theirs.feed(char))
        except _ERRORS:
            self._fail()

    def _fail(self) -> None:
        """Emit the part that cannot be read as content. All text after it will be content, too."""
        self._failed = True
        if self._raw:
            self._events.append(ContentText("".join(self._raw)))
            self._raw.clear()

    def _read(self, events: Iterable[dict[str, Any]]) -> None:
        """Emit the events that those of transformers make certain."""
        for event in events:
            match event["type"]:
                case "region_open":
                    self._field, self._is_fresh, self._space = event["field"], True, ""
                case "region_chunk" if self._field == _CALLS:
                    self._raw.append(event["text"])
                case "region_chunk":
                    self._emit_text(event["text"])
                case "region_close" if self._field == _CALLS:
                    self._emit_calls(event["value"])

    def _emit_text(self, text: str) -> None:
        """Emit text of a part: reasoning, or else content."""
        # 1. Drop or hold back the white space around the part.
        field = self._fields.get(self._field, {})
        if field.get("content_args", {}).get("strip", True):
            text = text.lstrip() if self._is_fresh else self._space + text
            kept = text.rstrip()
            self._space, text = text[len(kept) :], kept
        if not text:
            return
        # 2. Separate it from an earlier part of the same name.
        if self._is_fresh and self._field in self._seen:
            text = field.get("join", "\n") + text
        self._is_fresh = False
        self._seen.add(self._field)
        kind = ReasoningText if self._field in _REASONING else ContentText
        self._events.append(kind(text))

    def _emit_calls(self, value: Any) -> None:
        """Emit the call or the list of calls that a part holds, or its text if it holds none."""
        values = value if isinstance(value, list) else [value]
        calls = [call for each in values if (call := _call(each)) is not None]
        if not self._tools or not calls or len(calls) < len(values):
            self._events.append(ContentText("".join(self._raw)))
        else:
            for name, arguments in calls:
                self._begin_call(name)
                self._emit_arguments(arguments)
                self._end_call()
        self._raw.clear()


def _call(value: Any) -> tuple[str, str] | None:
    """Return the name and the arguments' JSON text of a call, or None if `value` is not one."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict):
        return None
    name = function.get("name")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        return None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, dict | None):
        return None
    return name, json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)


FORMAT = ToolFormat("response_template", ResponseTemplateParser)
"""Chosen by the flag, or by a tokenizer that has a template, if its chat template shows no other
format."""
