"""The events that an assistant's message consists of, and how they add up to the message."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple


class ContentText(NamedTuple):
    """More of the message's content."""

    text: str


class ReasoningText(NamedTuple):
    """More of the model's reasoning."""

    text: str


class ToolCallStart(NamedTuple):
    """The first event of a call. `call` counts the calls of the message from 0."""

    call: int
    id: str
    name: str


class ToolCallArguments(NamedTuple):
    """More of the JSON text of a call's arguments."""

    call: int
    text: str


Event = ContentText | ReasoningText | ToolCallStart | ToolCallArguments


def joined(events: Iterable[Event]) -> list[Event]:
    """Return the events with neighbours of the same kind merged into one."""
    result: list[Event] = []
    for _, group in groupby(events, _kind):
        neighbours = list(group)
        event = neighbours[0]
        if len(neighbours) > 1 and not isinstance(event, ToolCallStart):
            texts = (one.text for one in neighbours if not isinstance(one, ToolCallStart))
            event = event._replace(text="".join(texts))
        result.append(event)
    return result


def _kind(event: Event) -> Hashable:
    """Return what neighbours have in common that are merged; no two starts of calls have it."""
    return type(event), getattr(event, "call", None), getattr(event, "id", None)


def delta_of(event: Event) -> dict[str, Any]:
    """Return an event as the `delta` of a stream's chunk, in OpenAI's shape."""
    match event:
        case ContentText(text):
            return {"content": text}
        case ReasoningText(text):
            return {"reasoning": text, "reasoning_content": text}
        case ToolCallStart(call, id, name):
            function = {"name": name, "arguments": ""}
            first = {"index": call, "id": id, "type": "function", "function": function}
            return {"tool_calls": [first]}
        case ToolCallArguments(call, text):
            return {"tool_calls": [{"index": call, "function": {"arguments": text}}]}


@dataclass(slots=True)
class MessageBuilder:
    """Builds the whole message from events."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> None:
        """Append the next events."""
        for event in events:
            match event:
                case ContentText(text):
                    self.content += text
                case ReasoningText(text):
                    self.reasoning += text
                case ToolCallStart(_, id, name):
                    function = {"name": name, "arguments": ""}
                    self.calls.append({"id": id, "type": "function", "function": function})
                case ToolCallArguments(call, text):
                    self.calls[call]["function"]["arguments"] += text

    def message(self) -> dict[str, Any]:
        """Return the message in OpenAI's shape. An empty `content` is null if there are calls or
        reasoning."""
        only_content = not self.calls and not self.reasoning
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self.content if self.content or only_content else None,
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning"] = message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message
