"""Turns the text of an answer into the events of a message.

    text ─▶ ReasoningParser ─▶ parser of calls, fed with the content ─▶ hidden events dropped
                  └─ reasoning ─▶ UnclosedReasoning ─┘

Harmony has a single parser for reasoning and calls, in the place of the second.
"""

from __future__ import annotations

from collections.abc import Iterable

from .answer_parser import AnswerParser
from .calls_or_answer import CallsOrAnswer
from .message_events import ContentText, Event, ReasoningText, ToolCallStart, joined
from .reasoning import ReasoningParser
from .unclosed_reasoning import UnclosedReasoning


class MessageParser:
    """Turns one choice's text into events, which add up to the same message however the text is
    cut.

    `unclosed` finds calls in reasoning that is never closed. `max_calls` drops the calls after that
    many; without `show_reasoning`, reasoning is dropped.
    """

    def __init__(
        self,
        tools: AnswerParser | CallsOrAnswer | None = None,
        reasoning: ReasoningParser | None = None,
        *,
        unclosed: UnclosedReasoning | None = None,
        show_reasoning: bool = True,
        max_calls: int | None = None,
    ) -> None:
        self._tools = tools
        self._reasoning = reasoning
        self._unclosed = unclosed
        self._show_reasoning = show_reasoning
        self._max_calls = max_calls
        self._has_calls = False

    def feed(self, text: str) -> list[Event]:
        """Append `text` and return the events that it makes certain."""
        events: list[Event] = [ContentText(text)] if text else []
        if self._reasoning is not None:
            events = self._read_reasoning(self._reasoning.feed(text), self._reasoning)
        return self._shown(self._read_calls(events))

    def finish(self) -> list[Event]:
        """Return the remaining events, once no more text comes."""
        events: list[Event] = []
        if self._reasoning is not None:
            events = self._read_reasoning(self._reasoning.finish(), self._reasoning)
        events = self._read_calls(events)
        if self._tools is not None:
            events += self._tools.finish()
        if self._unclosed is not None:
            events += self._unclosed.finish()
        return self._shown(events)

    def finish_reason(self, reason: str | None) -> str | None:
        """Return the finish reason of the answer: that of the engine, except that an ordinary stop
        after calls is "tool_calls"."""
        return "tool_calls" if reason == "stop" and self._has_calls else reason

    def _read_reasoning(self, events: list[Event], parser: ReasoningParser) -> list[Event]:
        """Pass reasoning through the search for calls in it, until its closing tag has come."""
        if self._unclosed is None:
            return events
        read: list[Event] = []
        for event in events:
            if isinstance(event, ReasoningText):
                read += self._unclosed.feed(event.text)
        if parser.closed:
            read += self._unclosed.close()
            self._unclosed = None
        return read + [event for event in events if not isinstance(event, ReasoningText)]

    def _read_calls(self, events: Iterable[Event]) -> list[Event]:
        """Pass content through the parser of calls, if there is one."""
        if self._tools is None:
            return list(events)
        read: list[Event] = []
        for event in events:
            read += self._tools.feed(event.text) if isinstance(event, ContentText) else [event]
        return read

    def _shown(self, events: Iterable[Event]) -> list[Event]:
        """Drop the events that the client has not asked for, and merge the rest."""
        shown: list[Event] = []
        for event in events:
            if isinstance(event, ContentText):
                shown.append(event)
            elif isinstance(event, ReasoningText):
                shown += [event] if self._show_reasoning else []
            elif self._max_calls is None or event.call < self._max_calls:
                self._has_calls |= isinstance(event, ToolCallStart)
                shown.append(event)
        return joined(shown)
