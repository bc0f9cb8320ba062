"""Formats in which JSON objects, or lists of them, stand between tags: Hermes and its kin."""

from __future__ import annotations

from ..call_shape import JSON_CALL, NUMBER, CallShape
from ..json_calls import TaggedCalls
from ..tool_format import ToolFormat


class HermesParser(TaggedCalls):
    """Reads `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen 2.5 and 3, Granite
    4, SmolLM3, the demo model. Several objects, or a list, may stand between one pair of tags."""

    tags = {"<tool_call>": "</tool_call>"}
    markers = ("<tool_call>",)
    control_tokens = ("<tool_call>", "</tool_call>")


class MiniMaxM1Parser(TaggedCalls):
    """Reads `<tool_calls>` and `</tool_calls>` around objects or a list: MiniMax M1, Jamba."""

    tags = {"<tool_calls>": "</tool_calls>"}
    markers = ("<tool_calls>",)
    control_tokens = ("<tool_calls>", "</tool_calls>")


class NemotronParser(TaggedCalls):
    """Reads `<TOOLCALL>[{…}, {…}]</TOOLCALL>`: Nemotron."""

    tags = {"<TOOLCALL>": "</TOOLCALL>"}
    markers = ("<TOOLCALL>",)
    control_tokens = ("<TOOLCALL>", "</TOOLCALL>")


class GraniteParser(TaggedCalls):
    """Reads `<|tool_call|>[{…}, {…}]`: Granite 3, which may also write `<tool_call>`."""

    tags = {"<|tool_call|>": "", "<tool_call>": ""}
    markers = ("<|tool_call|>", "<tool_call>")
    control_tokens = ("<|tool_call|>", "<tool_call>")


class Phi4MiniParser(TaggedCalls):
    """Reads `<|tool_call|>[{…}]<|/tool_call|>` and `functools[{…}]`: Phi-4-mini."""

    tags = {"<|tool_call|>": "<|/tool_call|>", "functools": ""}
    markers = ("<|tool_call|>", "functools")
    bare_markers = ("functools",)
    control_tokens = ("<|tool_call|>", "<|/tool_call|>")


class CommandAParser(TaggedCalls):
    """Reads `<|START_ACTION|>[{"tool_call_id": …, "tool_name": …, "parameters": {…}}]
    <|END_ACTION|>`: Command R7B and Command A."""

    tags = {"<|START_ACTION|>": "<|END_ACTION|>"}
    markers = ("<|START_ACTION|>",)
    control_tokens = ("<|START_ACTION|>", "<|END_ACTION|>")


class CommandRParser(TaggedCalls):
    """Reads a list of `{"tool_name": …, "parameters": {…}}` in a block of code after `Action:`:
    Command R and R+."""

    tags = {"Action: ```json": "```", "Action:```json": "```"}
    markers = ("Action: ```json", "Action:```json")


def _hermes(template: str) -> CallShape:
    before, between, after = JSON_CALL
    return CallShape("", "<tool_call>\n" + before, between, after + "\n</tool_call>", "\n", "")


def _minimax(template: str) -> CallShape:
    return CallShape("<tool_calls>\n", *JSON_CALL, "\n", "\n</tool_calls>")


def _nemotron(template: str) -> CallShape:
    return CallShape("<TOOLCALL>[", *JSON_CALL, ", ", "]</TOOLCALL>")


def _granite(template: str) -> CallShape:
    return CallShape("<|tool_call|>[", *JSON_CALL, ", ", "]")


def _phi4_mini(template: str) -> CallShape:
    return CallShape("<|tool_call|>[", *JSON_CALL, ", ", "]<|/tool_call|>")


def _command_a(template: str) -> CallShape:
    before = f'    {{"tool_call_id": "{NUMBER}", "tool_name": "'
    first, last = "<|START_ACTION|>[\n", "\n]<|END_ACTION|>"
    return CallShape(first, before, '", "parameters": ', "}", ",\n", last)


def _command_r(template: str) -> CallShape:
    before, between = '    {\n        "tool_name": "', '",\n        "parameters": '
    return CallShape("Action: ```json\n[\n", before, between, "\n    }", ",\n", "\n]```")


FORMATS = (
    ToolFormat("cohere_command3", CommandAParser, _command_a, signs=(("<|START_ACTION|>",),)),
    ToolFormat(
        "command_r",
        CommandRParser,
        _command_r,
        signs=(("Action: ```json",), ("Action:```json",), ("Write 'Action:'",)),
    ),
    ToolFormat(
        "hermes",
        HermesParser,
        _hermes,
        signs=(("<tool_call>",),),
        aliases=("granite4", "smollm3"),
    ),
    ToolFormat(
        "minimax", MiniMaxM1Parser, _minimax, signs=(("<tool_calls>",),), aliases=("jamba",)
    ),
    ToolFormat(
        "nemotron_json",
        NemotronParser,
        _nemotron,
        signs=(("<TOOLCALL>",),),
        aliases=("llama_nemotron_json",),
    ),
    ToolFormat(
        "phi4_mini_json",
        Phi4MiniParser,
        _phi4_mini,
        signs=(("<|/tool_call|>",), ("<|/tool|>",)),
    ),
    ToolFormat(
        "granite", GraniteParser, _granite, signs=(("<|tool_call|>",), ("<|start_of_role|>",))
    ),
)

GENERIC = ToolFormat("generic", HermesParser, _hermes)
"""Hermes's calls for a model whose chat template reads no tools: quire tells it about them
(server/templates/generic_tools.py). It is only chosen by the flag."""
