"""The tools of a chat: which ones the model sees, and whether it must call one."""

from __future__ import annotations

from typing import Any

from ...engine.errors import InvalidRequestError
from ..parsing.formats.message_format import MessageFormat
from .field_types import NamedTool
from .protocol import ChatFields


def check_tools(body: ChatFields, message_format: MessageFormat) -> None:
    """Raise InvalidRequestError if `tool_choice` does not fit the tools, or if the model's format
    of calls is not known."""
    choice = body.tool_choice
    names = [tool.function.name for tool in body.tools or ()]
    if choice == "required" and not names:
        raise InvalidRequestError("tool_choice is required, but there are no tools", "tool_choice")
    if isinstance(choice, NamedTool) and choice.name not in names:
        raise InvalidRequestError(f"no tool has the name {choice.name[:128]!r}", "tool_choice")
    if offered_tools(body) and message_format.tool_format is None:
        raise InvalidRequestError(
            "the format of this model's tool calls is not known; see --tool-call-parser", "tools"
        )


def offered_tools(body: ChatFields) -> list[dict[str, Any]]:
    """Return the tools that the prompt shows to the model, in the form that chat templates read."""
    if body.tool_choice == "none":
        return []
    tools = []
    for tool in body.tools or ():
        function: dict[str, Any] = {"name": tool.function.name}
        if tool.function.description is not None:
            function["description"] = tool.function.description
        function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
        tools.append({"type": "function", "function": function})
    return tools


def forces_call(body: ChatFields) -> bool:
    """Return whether the answer must be a call."""
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)


def unenforced(body: ChatFields) -> list[str]:
    """Return the paths of `strict` fields without effect: only forced calls follow a schema."""
    return [
        f"tools[{index}].function.strict"
        for index, tool in enumerate(body.tools or ())
        if tool.function.strict and not forces_call(body)
    ]
