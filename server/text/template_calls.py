"""Tool calls of earlier turns for chat templates, which read arguments as objects or as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .call_arguments import parse_arguments

_PROBE_CALL = {"id": "probe0000", "type": "function"}
"""A tool call to try a template with. Some templates demand an id of nine characters."""


def with_objects(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the arguments of calls as objects; see `parse_arguments`."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {
        **call,
        "function": {**function, "arguments": parse_arguments(function["arguments"])},
    }


def reads_text(render: Callable[[list[dict[str, Any]]], str], errors: tuple[Any, ...]) -> bool:
    """Return whether a chat template reads arguments as JSON text.

    It does if it fails on an object with one of `errors`, or writes it as Python would, while a
    text comes out unchanged.
    """
    try:
        if "{'probe': 1}" not in render(_probe({"probe": 1})):
            return False
    except errors:
        pass
    try:
        return '{"probe": 1}' in render(_probe('{"probe": 1}'))
    except errors:
        return False


def _probe(arguments: Any) -> list[dict[str, Any]]:
    """Return a conversation with one call that has these arguments."""
    call = {**_PROBE_CALL, "function": {"name": "probe", "arguments": arguments}}
    return [
        {"role": "user", "content": "probe"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
