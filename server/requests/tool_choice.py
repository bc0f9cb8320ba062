"""The tools of a chat: which ones the model sees, which it may call, and whether it must.

Tools come as `tools` and `tool_choice`, or in the old form as `functions` and `function_call`. A
custom tool is shown to the model as a function with one text, `input`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic_core import from_json

from ...engine.errors import InvalidRequestError
from ..json_text import encode_json
from ..parsing.formats.message_format import MessageFormat
from .field_types import AllowedTools, NamedTool
from .protocol import ChatFields, FunctionDefinition, Message, ToolCall, ToolCallFunction

CUSTOM_INPUT = "input"
"""The only parameter of the function that stands for a custom tool."""
_CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {CUSTOM_INPUT: {"type": "string"}},
    "required": [CUSTOM_INPUT],
    "additionalProperties": False,
}


class _Choice(NamedTuple):
    """What `tool_choice` or `function_call` asks for."""

    mode: Literal["none", "auto", "required"]
    callable: frozenset[str] | None = None
    """The tools that may be called; None for all."""
    hides_others: bool = False
    """Tools that may not be called are not shown."""


def _choice(body: ChatFields) -> _Choice:
    choice = body.tool_choice if body.functions is None else body.function_call
    match choice:
        case NamedTool(name):
            return _Choice("required", frozenset((name,)))
        case AllowedTools(mode, names):
            return _Choice(mode, frozenset(names), hides_others=True)
        case _:
            return _Choice(choice or "auto")


def check_tools(body: ChatFields, message_format: MessageFormat) -> None:
    """Raise InvalidRequestError if `tool_choice` does not fit the tools, or if the model's format
    of calls is not known."""
    # 1. Each form of asking for tools has two fields, which belong together.
    old = body.functions is not None
    if old and (body.tools or body.tool_choice is not None):
        raise InvalidRequestError(
            "functions: is the old form of tools and cannot be combined with tools or tool_choice",
            "functions",
        )
    if body.function_call not in (None, "none", "auto") and not old:
        raise InvalidRequestError("function_call: needs functions", "function_call")
    for index, tool in enumerate(body.tools or ()):
        if getattr(tool, tool.type) is None:
            param = f"tools[{index}].{tool.type}"
            raise InvalidRequestError(f"{param}: is missing", param)
    # 2. The choice must be possible.
    param = "function_call" if old else "tool_choice"
    names = {tool["function"]["name"] for tool in _all_tools(body)}
    mode, wanted, _ = _choice(body)
    if mode == "required" and wanted is None and not names:
        raise InvalidRequestError(f"{param} is required, but there are no tools", param)
    for name in sorted((wanted or frozenset()) - names):
        raise InvalidRequestError(f"no tool has the name {name[:128]!r}", param)
    if offered_tools(body) and message_format.tool_format is None:
        raise InvalidRequestError(
            "the format of this model's tool calls is not known; see --tool-call-parser",
            "functions" if old else "tools",
        )


def _all_tools(body: ChatFields) -> list[dict[str, Any]]:
    """Return all tools of a body as functions, in the form that chat templates read."""
    definitions = [tool.custom or tool.function for tool in body.tools or ()]
    tools = []
    for one in [*filter(None, definitions), *(body.functions or ())]:
        function: dict[str, Any] = {"name": one.name}
        if one.description is not None:
            function["description"] = one.description
        if isinstance(one, FunctionDefinition):
            function["parameters"] = one.parameters or {"type": "object", "properties": {}}
        else:
            function["parameters"] = _CUSTOM_PARAMETERS
        tools.append({"type": "function", "function": function})
    return tools


def offered_tools(body: ChatFields) -> list[dict[str, Any]]:
    """Return the tools that the prompt shows to the model, in the form that chat templates read."""
    mode, callable, hides_others = _choice(body)
    if mode == "none":
        return []
    tools = _all_tools(body)
    if hides_others and callable is not None:
        tools = [tool for tool in tools if tool["function"]["name"] in callable]
    return tools


def callable_tools(body: ChatFields) -> list[dict[str, Any]]:
    """Return the functions that the model may call, as `offered_tools` writes them."""
    allowed = _choice(body).callable
    functions = [tool["function"] for tool in offered_tools(body)]
    return [one for one in functions if allowed is None or one["name"] in allowed]


def forces_call(body: ChatFields) -> bool:
    """Return whether the answer must be a call."""
    return _choice(body).mode == "required"


def allows_many_calls(body: ChatFields) -> bool:
    """Return whether an answer may have several calls. The old form has room for one only, and a
    tool that is chosen by name is called once."""
    parallel = getattr(body, "parallel_tool_calls", None) is not False
    return parallel and body.functions is None


def names_one_tool(body: ChatFields) -> bool:
    """Return whether the body asks for the call of one tool by its name."""
    return isinstance(body.tool_choice if body.functions is None else body.function_call, NamedTool)


def custom_tools(body: ChatFields) -> frozenset[str]:
    """Return the names of the custom tools."""
    return frozenset(tool.custom.name for tool in body.tools or () if tool.custom is not None)


def custom_input(arguments: str) -> str:
    """Return the text that the model wrote as the input of a custom tool, as far as it came, from
    the arguments of its call. Arguments that are not the expected object are returned as they are,
    so that nothing is lost."""
    try:
        value = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return arguments
    text = value.get(CUSTOM_INPUT) if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


def without_effect(body: ChatFields) -> list[str]:
    """Return the names of fields about tools in a body without tools."""
    if body.tools or body.functions:
        return []
    names = ("tool_choice", "parallel_tool_calls", "function_call")
    return [name for name in names if getattr(body, name, None) is not None]


def unenforced(body: ChatFields) -> list[str]:
    """Return the paths of the `strict` fields of tools: without a grammar they have no effect."""
    return [
        f"tools[{index}].function.strict"
        for index, tool in enumerate(body.tools or ())
        if tool.function is not None and tool.function.strict
    ]


def in_todays_form(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose old calls (`function_call`, role "function") and custom calls are calls
    of functions."""
    written = []
    call_id = ""
    for index, message in enumerate(messages):
        if message.function_call is not None:
            call_id = f"call{index:05d}"  # nine characters, which some templates demand
            call = ToolCall(id=call_id, function=message.function_call)
            changes: dict[str, Any] = {"function_call": None, "tool_calls": [call]}
        elif message.role == "function":
            changes = {"role": "tool", "tool_call_id": call_id}
        elif any(call.custom is not None for call in message.tool_calls or ()):
            changes = {"tool_calls": [_as_function(call) for call in message.tool_calls or ()]}
        else:
            changes = {}
        written.append(message.model_copy(update=changes) if changes else message)
    return written


def _as_function(call: ToolCall) -> ToolCall:
    if call.custom is None:
        return call
    arguments = encode_json({CUSTOM_INPUT: call.custom.input}).decode()
    function = ToolCallFunction(name=call.custom.name, arguments=arguments)
    return ToolCall(id=call.id, function=function)
