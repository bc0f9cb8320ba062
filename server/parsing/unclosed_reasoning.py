"""Calls that a model writes inside of reasoning that it never closes.

Such a model thinks, calls, and forgets the closing tag between the two. Whether the tag is missing
shows only at the end of the text, so what may be calls is held back until the tag or the end comes:

    <think> Let me look. <tool_call>{…}</tool_call> Yes. </think> …     all of it is reasoning
    <think> Let me look. <tool_call>{…}</tool_call>                     reasoning, then a call
"""

from __future__ import annotations

from .answer_parser import AnswerParser
from .message_events import ContentText, Event, ReasoningText, ToolCallStart


class UnclosedReasoning:
    """Passes on reasoning up to the first call in it, and holds back everything from there."""

    def __init__(self, parser: AnswerParser) -> None:
        """`parser` looks for calls; it must not take ordinary text for one."""
        self._parser = parser
        self._held: list[str] = []
        """Reasoning that was not passed on."""
        self._events: list[Event] = []
        """The first call, and all that the parser made of the text after it."""

    def feed(self, text: str) -> list[Event]:
        """Append reasoning and return the part of it that is certainly not a call."""
        self._held.append(text)
        return self._read(self._parser.feed(text))

    def close(self) -> list[Event]:
        """Return what was held back as reasoning, since its closing tag has come."""
        text = "".join(self._held)
        self._held.clear()
        return [ReasoningText(text)] if text else []

    def finish(self) -> list[Event]:
        """Return what was held back as calls and content, if it holds a call, since the text has
        ended."""
        return self._read(self._parser.finish()) + (self._events or self.close())

    def _read(self, events: list[Event]) -> list[Event]:
        """Return the reasoning that comes before the first call; keep all that comes after."""
        passed = 0
        for event in events:
            if self._events or isinstance(event, ToolCallStart):
                self._events.append(event)
            elif isinstance(event, ContentText):
                passed += len(event.text)
        if not passed:
            return []
        # What a parser makes content is the beginning of what it has not made content yet.
        held = "".join(self._held)
        self._held = [held[passed:]] if held[passed:] else []
        return [ReasoningText(held[:passed])]
