"""All formats of tool calls, by name, and which of them a chat template shows."""

from __future__ import annotations

from ..tool_format import ToolFormat
from . import (
    deepseek,
    gemma,
    harmony,
    kimi,
    llama,
    mistral,
    pythonic,
    response_template,
    tagged_json,
    tagged_parameters,
)

_IN_ORDER: tuple[ToolFormat, ...] = (
    *harmony.FORMATS,
    *gemma.FORMATS,
    *kimi.FORMATS,
    *deepseek.FORMATS,
    *tagged_parameters.FORMATS,  # before Hermes, whose tag some of these have too
    *tagged_json.FORMATS,
    *mistral.FORMATS,
    *pythonic.FORMATS,  # before Llama, whose tag Llama 4's template has too
    *llama.FORMATS,
)
"""The formats that a chat template can show, in the order in which they are looked for."""

TOOL_FORMATS: dict[str, ToolFormat] = {
    format.name: format for format in (*_IN_ORDER, tagged_json.GENERIC, response_template.FORMAT)
}
"""Format by its name."""

CANONICAL_NAMES: dict[str, str] = {
    name: format.name for format in TOOL_FORMATS.values() for name in (format.name, *format.aliases)
}
"""Name of the format by the value of --tool-call-parser."""


def detect_tool_format(template: str) -> str | None:
    """Return the name of the format that a chat template mentions, or None if it mentions none."""
    return next((format.name for format in _IN_ORDER if format.is_in(template)), None)
