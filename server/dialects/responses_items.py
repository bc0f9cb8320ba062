"""The items of a response's conversation, which become the messages of a chat."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from ..api.translation import Path, Transcript, parts_of, unsupported_type
from ..requests.field_types import Fields
from ..requests.tool_choice import CUSTOM_INPUT
from .hints import Ignored
from .messages_blocks import OMITTED
from .responses_tools import Tools, action_arguments, function_name
from .sealed import unseal

SUMMARY = "Summary of the conversation so far:\n"
"""Stands before what a compaction has kept."""
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class _Item(Fields):
    """The fields that all items may have."""

    id: str | None = None
    status: str | None = None
    created_by: str | None = None


class MessageItem(_Item):
    type: Literal["message"] = "message"
    phase: str | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Any


class FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class CustomCallItem(_Item):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None
    input: str


class ShellCallItem(_Item):
    type: Literal["local_shell_call", "shell_call"]
    call_id: str | None = None
    action: dict[str, Any]
    environment: Any = None


class ToolSearchCallItem(_Item):
    type: Literal["tool_search_call"]
    call_id: str | None = None
    execution: str | None = None
    arguments: Any


class OutputItem(_Item):
    type: Literal[
        "function_call_output",
        "custom_tool_call_output",
        "local_shell_call_output",
        "shell_call_output",
    ]
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    max_output_length: int | None = None
    output: Any


class ToolSearchOutputItem(_Item):
    type: Literal["tool_search_output"]
    call_id: str | None = None
    execution: str | None = None
    tools: list[Any] = Field(fail_fast=True)


class AdditionalToolsItem(_Item):
    type: Literal["additional_tools"]
    role: Literal["developer"] = "developer"
    tools: list[Any] = Field(fail_fast=True)


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None


class CompactionItem(_Item):
    type: Literal["compaction", "compaction_summary"]
    encrypted_content: str


ITEMS: dict[str, type[_Item]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": OutputItem,
    "custom_tool_call": CustomCallItem,
    "custom_tool_call_output": OutputItem,
    "local_shell_call": ShellCallItem,
    "local_shell_call_output": OutputItem,
    "shell_call": ShellCallItem,
    "shell_call_output": OutputItem,
    "tool_search_call": ToolSearchCallItem,
    "tool_search_output": ToolSearchOutputItem,
    "additional_tools": AdditionalToolsItem,
    "reasoning": ReasoningItem,
    "compaction": CompactionItem,
    "compaction_summary": CompactionItem,
}
"""The types of items that the model reads."""

HOSTED = (
    "web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call",
    "computer_call", "computer_call_output", "mcp_call", "mcp_list_tools", "mcp_approval_request",
    "mcp_approval_response", "apply_patch_call", "apply_patch_call_output",
)  # fmt: skip
"""The types of items of tools that this server does not offer. They are left out."""


def with_ids(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return items as they are listed: each with an id and a status, and without nulls. The content
    of a message is a list of parts."""
    listed = []
    for item in items:
        given = {name: value for name, value in item.items() if value is not None}
        content = given.get("content")
        if isinstance(content, str):
            part: dict[str, Any] = {"type": "input_text", "text": content}
            if given.get("role") == "assistant":
                part = {"type": "output_text", "text": content, "annotations": []}
            given["content"] = [part]
        added = {"id": f"item_{uuid.uuid4().hex}", "type": "message", "status": "completed"}
        listed.append({**added, **given})
    return listed


class ItemReader:
    """Reads items into `transcript`, and adds the tools that they bring to `tools`."""

    def __init__(self, tools: Tools, ignored: Ignored) -> None:
        self.transcript = Transcript()
        self._tools = tools
        self._ignored = ignored

    def read(self, fields: dict[str, Any], where: Path) -> None:
        """Add an item to the transcript. Raises InvalidRequestError."""
        kind = fields.get("type") or "message"
        if kind in HOSTED:
            self._ignored.add(where)
            return
        model = ITEMS.get(kind) if isinstance(kind, str) else None
        if model is None:
            raise unsupported_type(kind, where)
        item = self._ignored.check(model, {**fields, "type": kind}, where)
        transcript = self.transcript
        match item:
            case MessageItem():
                content = self._texts(item.content, (*where, "content"))
                if item.role == "assistant":
                    transcript.add_text(content)
                else:
                    transcript.add(item.role, content)
            case ReasoningItem():
                self._read_reasoning(item, where)
            case CompactionItem():
                if (summary := unseal(item.encrypted_content)) is None:
                    self._ignored.add((*where, "encrypted_content"))
                else:
                    transcript.add("user", SUMMARY + summary)
            case AdditionalToolsItem():
                self._tools.add(item.tools, (*where, "tools"))
            case ToolSearchOutputItem():
                names = self._tools.add(item.tools, (*where, "tools"))
                found = f"These tools can be called now: {', '.join(names)}"
                transcript.add("tool", found, tool_call_id=item.call_id or item.id)
            case OutputItem():
                output = item.output
                if item.type == "shell_call_output":
                    output = _shell_output(output)
                content = self._texts(output, (*where, "output"), in_result=True)
                transcript.add("tool", content, tool_call_id=item.call_id or item.id)
            case _:
                self._read_call(item)

    def _read_call(self, item: _Item) -> None:
        """Add a call of the model as the call of the function that stands for its tool."""
        match item:
            case FunctionCallItem():
                name, arguments = function_name(item.name, item.namespace), item.arguments
            case CustomCallItem():
                name = function_name(item.name, item.namespace)
                arguments = json.dumps({CUSTOM_INPUT: item.input}, ensure_ascii=False)
            case ShellCallItem():
                name, arguments = item.type.removesuffix("_call"), action_arguments(item.action)
            case ToolSearchCallItem():
                given = item.arguments
                name = "tool_search"
                arguments = given if isinstance(given, str) else json.dumps(given)
            case _:
                raise AssertionError(item)
        call_id = getattr(item, "call_id", None) or item.id or ""
        self.transcript.add_call(call_id, name, arguments)

    def _read_reasoning(self, item: ReasoningItem, where: Path) -> None:
        """Add the reasoning itself if the item has it, or else what quire has sealed, or else its
        summary."""
        parts = self._texts(item.content or [], (*where, "content"))
        summary = self._texts(item.summary or [], (*where, "summary"))
        text = "\n".join(part["text"] for part in parts)
        if not text and item.encrypted_content:
            unsealed = unseal(item.encrypted_content)
            if unsealed is None:
                self._ignored.add((*where, "encrypted_content"))
            text = unsealed or ""
        text = text or "\n".join(part["text"] for part in summary)
        if text:
            self.transcript.add_reasoning(text)

    def _texts(self, value: Any, where: Path, *, in_result: bool = False) -> list[dict[str, str]]:
        """Return content as text parts of the chat. In a tool's result, a note stands for what is
        not text."""
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        parts = []
        for index, part in enumerate(parts_of(value, where)):
            kind = part.get("type")
            if kind in _TEXTS:
                self._ignored.check(_TextPart, part, (*where, index))
                text = part["text"]
            elif kind == "refusal" and isinstance(part.get("refusal"), str):
                text = part["refusal"]
            elif in_result and kind in ("input_image", "input_file"):
                self._ignored.add((*where, index))
                text = OMITTED.format(kind.removeprefix("input_"))
            else:
                raise unsupported_type(kind, (*where, index))
            parts.append({"type": "text", "text": text})
        return parts


class _TextPart(Fields):
    type: str
    text: str
    annotations: Any = None
    logprobs: Any = None
    parsed: Any = None
    prompt_cache_breakpoint: Any = None


def _shell_output(output: Any) -> Any:
    """Return the outputs of a shell's commands as text; anything else as it is."""
    if not isinstance(output, list) or not all(isinstance(each, dict) for each in output):
        return output
    texts = []
    for each in output:
        outcome = each.get("outcome")
        ended = outcome if isinstance(outcome, dict) else {}
        end = f"exit code: {ended['exit_code']}" if "exit_code" in ended else ended.get("type")
        texts += [each.get("stdout"), each.get("stderr"), end]
    return "\n".join(str(text) for text in texts if text)
