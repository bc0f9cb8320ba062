"""The tools of a response: which function of the chat stands for which tool, and how it is called.

tool                        the model sees
function                    the function
custom                      a function whose only parameter is the text `input`
namespace of these          functions named namespace__name
local_shell, shell,         functions whose arguments are the action; the client runs them
tool_search of the client
all others                  nothing: OpenAI's servers run them, and this server does not
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from pydantic import Field

from ...engine.errors import InvalidRequestError
from ..api.translation import Path, unsupported_type
from ..requests.field_types import Fields, ToolName, ToolParameters
from ..requests.protocol import path_of
from ..requests.tool_choice import CUSTOM_INPUT
from .hints import Ignored

Kind = Literal["function", "custom", "local_shell", "shell", "tool_search"]
_STRINGS = {"type": "array", "items": {"type": "string"}}
_INTEGER = {"type": "integer"}
_SYNTAXES = ("lark", "regex")
MAX_TOOL_NAME = 128
"""Maximum characters of the name of a function."""


class FunctionTool(Fields):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: ToolParameters = None
    strict: bool | None = None
    defer_loading: Any = None  # a function that is there can be called at once


class CustomTool(Fields):
    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: dict[str, Any] | None = None
    defer_loading: Any = None


class NamespaceTool(Fields):
    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: list[dict[str, Any]] = Field(fail_fast=True)


class LocalShellTool(Fields):
    type: Literal["local_shell"]


class ShellTool(Fields):
    type: Literal["shell"]
    environment: dict[str, Any] | None = None


class ToolSearchTool(Fields):
    type: Literal["tool_search"]
    execution: Literal["client"]
    description: str | None = None
    parameters: ToolParameters = None


@dataclass(frozen=True, slots=True)
class Called:
    """The tool that a function of the chat stands for."""

    kind: Kind
    name: str
    namespace: str | None = None


def function_name(name: str, namespace: str | None) -> str:
    """Return the name of the function that stands for a tool."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


class Tools:
    """The tools of one response. `functions` are those of the chat."""

    def __init__(self, ignored: Ignored) -> None:
        self._ignored = ignored
        self._called: dict[str, Called] = {}
        self._forced = False
        self._strict: list[Path] = []
        self.functions: list[dict[str, Any]] = []

    def find(self, function: str) -> Called:
        """Return the tool that a function of the chat stands for; a name that no tool has is a
        function's."""
        return self._called.get(function) or Called("function", function)

    def add(self, tools: Sequence[Any], where: Path) -> list[str]:
        """Offer the tools at `where` and return the names of their functions. Those that this
        server cannot offer are named as ignored. Raises InvalidRequestError."""
        return [
            name
            for index, tool in enumerate(tools)
            for name in self._add(tool, (*where, index), None)
        ]

    def _add(self, tool: Any, where: Path, namespace: NamespaceTool | None) -> list[str]:
        if not isinstance(tool, dict):
            raise InvalidRequestError(f"{path_of(where)}: must be an object", path_of(where))
        check = self._ignored.check
        match tool.get("type"):
            case "function":
                function = check(FunctionTool, tool, where)
                if function.strict:
                    self._strict.append((*where, "strict"))
                return [self._offer(Called("function", tool["name"]), tool, namespace, where)]
            case "custom":
                custom = check(CustomTool, tool, where)
                return [self._offer_custom(custom, namespace, where)]
            case "namespace" if namespace is None:
                inner = check(NamespaceTool, tool, where)
                names = []
                for index, each in enumerate(inner.tools):
                    names += self._add(each, (*where, "tools", index), inner)
                    inner = inner.model_copy(update={"description": None})  # once is enough
                return names
            case "local_shell":
                check(LocalShellTool, tool, where)
                return [
                    self._offer(
                        Called("local_shell", "local_shell"), _LOCAL_SHELL, namespace, where
                    )
                ]
            case "shell" if (tool.get("environment") or {}).get("type", "local") == "local":
                check(ShellTool, tool, where)
                return [self._offer(Called("shell", "shell"), _SHELL, namespace, where)]
            case "tool_search" if tool.get("execution") == "client":
                check(ToolSearchTool, tool, where)
                return [self._offer(Called("tool_search", "tool_search"), tool, namespace, where)]
            case str():
                self._ignored.add(where)
                return []
            case kind:
                raise unsupported_type(kind, where)

    def _offer_custom(
        self, custom: CustomTool, namespace: NamespaceTool | None, where: Path
    ) -> str:
        """Offer a custom tool. The model is told the grammar of its input, but not held to it."""
        description = custom.description or ""
        if custom.format is not None and custom.format.get("type") != "text":
            syntax, definition = custom.format.get("syntax"), custom.format.get("definition")
            if syntax not in _SYNTAXES or not isinstance(definition, str):
                param = path_of((*where, "format"))
                raise InvalidRequestError(
                    f'{param}: must be of type "text", or a grammar with a definition and the '
                    'syntax "lark" or "regex"',
                    param,
                )
            self._ignored.add((*where, "format"))
            description += f"\n\nThe input must follow this grammar ({syntax}):\n{definition}"
        schema = {
            "type": "object",
            "properties": {CUSTOM_INPUT: {"type": "string"}},
            "required": [CUSTOM_INPUT],
        }
        function = {"description": description.strip() or None, "parameters": schema}
        return self._offer(Called("custom", custom.name), function, namespace, where)

    def _offer(
        self,
        called: Called,
        fields: Mapping[str, Any],
        namespace: NamespaceTool | None,
        where: Path,
    ) -> str:
        """Add a function with the description and the parameters in `fields`."""
        space = namespace.name if namespace is not None else None
        name = function_name(called.name, space)
        names = ("description", "parameters", "strict")
        function = {key: fields[key] for key in names if fields.get(key) is not None}
        if namespace is not None and namespace.description:
            heads = (f"{space}: {namespace.description}", function.get("description"))
            function["description"] = "\n\n".join(head for head in heads if head)
        if len(name) > MAX_TOOL_NAME:
            param = path_of((*where, "name"))
            raise InvalidRequestError(
                f"{param}: is longer than {MAX_TOOL_NAME} characters with its namespace", param
            )
        if name in self._called and where[0] != "tools":
            return name  # an item of the conversation repeats a tool
        self._called[name] = Called(called.kind, called.name, space)
        self.functions.append({"type": "function", "function": {"name": name, **function}})
        return name

    def choose(self, choice: Any) -> Any:
        """Return the chat's `tool_choice`, and drop the functions that it does not allow. Raises
        InvalidRequestError."""
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            allowed = choice.get("tools")
            if not isinstance(allowed, list) or choice.get("mode") not in ("auto", "required"):
                raise InvalidRequestError(
                    'tool_choice: allowed_tools needs tools, and the mode "auto" or "required"',
                    "tool_choice",
                )
            names = [
                self._chosen(each, ("tool_choice", "tools", index))
                for index, each in enumerate(allowed)
            ]
            kept = [tool for tool in self.functions if tool["function"]["name"] in names]
            self.functions = kept
            choice = choice["mode"] if kept or choice["mode"] == "required" else "none"
        elif isinstance(choice, dict):
            name = self._chosen(choice, ("tool_choice",))
            if name is None:
                raise unsupported_type(choice.get("type"), ("tool_choice",))
            choice = {"type": "function", "function": {"name": name}}
        if choice != "required" and not isinstance(choice, dict):
            for where in self._strict:
                self._ignored.mention(where)
        return choice

    def _chosen(self, choice: Any, where: Path) -> str | None:
        """Return the name of the function that `choice` means; None for a tool that this server
        does not run."""
        kind = choice.get("type") if isinstance(choice, dict) else None
        if kind in ("function", "custom"):
            name = choice.get("name")
            if not isinstance(name, str):
                param = path_of((*where, "name"))
                raise InvalidRequestError(f"{param}: must be a string", param)
            return function_name(name, choice.get("namespace"))
        if kind in ("local_shell", "shell", "tool_search"):
            return str(kind)
        return None


_LOCAL_SHELL = {
    "description": "Runs a command on the user's machine and returns its output.",
    "parameters": {
        "type": "object",
        "properties": {
            "command": _STRINGS, "working_directory": {"type": "string"}, "timeout_ms": _INTEGER
        },
        "required": ["command"],
    },
}  # fmt: skip
_SHELL = {
    "description": "Runs shell commands on the user's machine and returns their output.",
    "parameters": {
        "type": "object",
        "properties": {
            "commands": _STRINGS, "timeout_ms": _INTEGER, "max_output_length": _INTEGER
        },
        "required": ["commands"],
    },
}  # fmt: skip


class _LocalShellAction(msgspec.Struct):
    command: list[str]
    working_directory: str | None = None
    timeout_ms: int | None = None


class _ShellAction(msgspec.Struct):
    commands: list[str]
    timeout_ms: int | None = None
    max_output_length: int | None = None


def client_call(kind: Kind, arguments: str) -> dict[str, Any] | None:
    """Return the fields of the item of a call that the client runs, or None if `arguments` are not
    complete or do not fit, so that nothing half-written is run."""
    try:
        match kind:
            case "local_shell":
                local = msgspec.json.decode(arguments, type=_LocalShellAction)
                action = {"type": "exec", "env": {}, "user": None, **msgspec.structs.asdict(local)}
                return {"type": "local_shell_call", "action": action}
            case "shell":
                shell = msgspec.json.decode(arguments, type=_ShellAction)
                return {"type": "shell_call", "action": msgspec.structs.asdict(shell)}
            case _:
                searched = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
                return {"type": "tool_search_call", "execution": "client", "arguments": searched}
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def action_arguments(action: Mapping[str, Any]) -> str:
    """Return the arguments of the function that stands for a shell, from the action of a call."""
    names = ("command", "commands", "working_directory", "timeout_ms", "max_output_length")
    given = {name: action[name] for name in names if action.get(name) is not None}
    return json.dumps(given, ensure_ascii=False)
