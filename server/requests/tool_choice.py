"""`tools` and `tool_choice` of a request, checked."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

MAX_TOOLS = 1024


class NamedTool(NamedTuple):
    """The model must call this one."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def check_parameters(value: Any) -> dict[str, Any] | None:
    """The JSON schema of an object, as far as chat templates rely on it. Raises ValueError."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("type", "object") != "object":
        raise ValueError('must be the JSON schema of an object, {"type": "object", …}')
    if not isinstance(value.get("properties", {}), dict):
        raise ValueError("its properties must be an object")
    return value


def check_tool_choice(value: Any) -> ToolChoice | None:
    """Raises ValueError."""
    if value is None or value in ("none", "auto", "required"):
        return value  # type: ignore[no-any-return]
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or value != {"type": "function", "function": {"name": name}}:
        raise ValueError(
            'must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}'
        )
    return NamedTool(name)


def check_unique(tools: list[Any] | None) -> list[Any] | None:
    """Raises ValueError where two tools have one name."""
    names: set[str] = set()
    for tool in tools or ():
        name = tool.function.name
        if name in names:
            raise ValueError(f"two tools have the name {name!r}")
        names.add(name)
    return tools
