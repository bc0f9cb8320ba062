"""Helpers that cut texts into pieces and read the messages that parsers make of them."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from quire.server.parsing.message_events import MessageBuilder, ToolCallArguments, ToolCallStart
from quire.server.parsing.message_parser import MessageParser

TOOLS: dict[str, dict[str, Any]] = {
    "f": {"type": "object"},
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "array", "items": {"type": "number"}},
            "hourly": {"type": "boolean"},
        },
    },
    "note": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "level": {"type": ["integer", "null"]},
            "ratio": {"type": "number"},
            "urgent": {"type": "boolean"},
            "place": {"$ref": "#/$defs/Place"},
            "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
            "kind": {"enum": ["to do", "done"]},
            "code": {"type": ["string", "integer"]},
        },
        "required": ["text"],
        "$defs": {"Place": {"type": "object", "properties": {"name": {"type": "string"}}}},
    },
}
"""Tools of the samples, with the schemas of their arguments."""
WEATHER = '{"city": "Zürich", "days": [1, 2.5e3], "hourly": false}'
NASTY = r'{"a": "</tool_call> \" } ] \\", "b": "\u00e9\ud83c\udf89", "c\"": {"d": [{}, [], null]}}'

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)  # fmt: skip


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def cut(text: str, rng: random.Random) -> list[str]:
    """Cut a text at up to seven random places. Pieces may be empty."""
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
    return [text[start:end] for start, end in zip([0, *places], [*places, None], strict=True)]


def read(parser: MessageParser, pieces: list[str]) -> dict[str, Any]:
    """Return the message that the parser makes of these pieces; check the order of its events."""
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    begun = 0
    for event in events:
        if isinstance(event, ToolCallStart):
            assert event.call == begun
            begun += 1
        elif isinstance(event, ToolCallArguments):
            assert event.call == begun - 1 and event.text
        else:
            assert event.text
    builder = MessageBuilder()
    builder.add(events)
    message = builder.message()
    calls = message.get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls) == begun
    return message


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names and arguments of a message's calls."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [(each["name"], each["arguments"]) for each in functions]
