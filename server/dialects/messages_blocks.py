"""The content of Anthropic's messages: typed blocks, which become the messages of a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import takewhile
from typing import Annotated, Any, Literal

from pydantic import Field

from ...engine.errors import InvalidRequestError
from ..api.translation import Content, Path, Transcript, parts_of, unsupported_type
from ..requests.field_types import Fields
from ..requests.protocol import MAX_MESSAGES, path_of
from .hints import Ignored
from .sealed import unseal

OMITTED = "[{} omitted: this server reads only text]"
"""Stands for what a tool has returned, but the model cannot read."""
BILLING = "x-anthropic-billing-header:"
"""The beginning of a block of `system` that Claude Code writes for Anthropic's accounting. It would
keep conversations from sharing their prefixes, so it is left out."""


class CacheControl(Fields):
    """Accepted without effect, since every prefix is cached."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class MessageParam(Fields):
    role: Literal["user", "assistant", "system"]
    content: Content


Messages = Annotated[
    list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


class TextBlock(Fields):
    type: Literal["text"]
    text: str
    citations: None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(Fields):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Fields):
    type: Literal["redacted_thinking"]
    data: str


class CompactionBlock(Fields):
    type: Literal["compaction"]
    content: str | None = None
    cache_control: CacheControl | None = None


class ToolUseBlock(Fields):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None
    cache_control: CacheControl | None = None


class ToolResultBlock(Fields):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Any = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class ToolReferenceBlock(Fields):
    type: Literal["tool_reference"]
    tool_name: str
    cache_control: CacheControl | None = None


class DocumentBlock(Fields):
    type: Literal["document"]
    source: dict[str, Any]
    title: str | None = None
    context: str | None = None
    citations: Any = None
    cache_control: CacheControl | None = None


class SearchResultBlock(Fields):
    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]
    citations: Any = None
    cache_control: CacheControl | None = None


class ImageBlock(Fields):
    type: Literal["image"]
    source: Any
    cache_control: CacheControl | None = None


class ToolChangeBlock(Fields):
    """A tool that can be called from here on, or no longer."""

    type: Literal["tool_addition", "tool_removal"]
    tool: dict[str, Any]
    cache_control: CacheControl | None = None


class HostedBlock(Fields):
    """A tool that another server has run, or its result."""

    type: str


_READABLE: dict[str, type[Fields]] = {
    "text": TextBlock, "document": DocumentBlock, "search_result": SearchResultBlock
}  # fmt: skip
_IN_RESULT: dict[str, type[Fields]] = {
    **_READABLE, "image": ImageBlock, "tool_reference": ToolReferenceBlock
}  # fmt: skip
_HOSTED = (
    "server_tool_use", "web_search_tool_result", "web_fetch_tool_result",
    "code_execution_tool_result", "bash_code_execution_tool_result",
    "text_editor_code_execution_tool_result", "tool_search_tool_result", "advisor_tool_result",
    "mcp_tool_use", "mcp_tool_result", "mcp_tool_listing", "container_upload", "fallback",
)  # fmt: skip
BLOCKS: dict[str, dict[str, type[Fields]]] = {
    "user": {**_READABLE, "tool_result": ToolResultBlock},
    "system": {
        "text": TextBlock, "tool_addition": ToolChangeBlock, "tool_removal": ToolChangeBlock
    },
    "assistant": {
        "text": TextBlock,
        "thinking": ThinkingBlock,
        "redacted_thinking": RedactedThinkingBlock,
        "compaction": CompactionBlock,
        "tool_use": ToolUseBlock,
        **dict.fromkeys(_HOSTED, HostedBlock),
    },
}  # fmt: skip
"""The types of blocks in a message, by its role."""


class Reader:
    """Reads messages into `transcript`, and collects what they say about tools."""

    def __init__(self, ignored: Ignored) -> None:
        self._ignored = ignored
        self.transcript = Transcript()
        self.referenced: set[str] = set()
        """The names of deferred tools that a message has made known to the model."""
        self.removed: set[str] = set()
        """The names of tools that a message has taken away."""
        self.defined: list[tuple[dict[str, Any], Path]] = []
        """Tools that a message has defined, with their paths."""

    def read_system(self, value: Any) -> None:
        """Add the body's `system` to the transcript. Raises InvalidRequestError."""
        texts = []
        for index, block in enumerate(self._blocks(value, ("system",), {"text": TextBlock})):
            if block.text.startswith(BILLING):
                self._ignored.mention(("system", index))
            else:
                texts.append(_text(block.text))
        if texts:
            self.transcript.add("system", texts)

    def read(self, message: MessageParam, where: Path) -> None:
        """Add a message to the transcript. Raises InvalidRequestError."""
        where = (*where, "content")
        blocks = self._blocks(message.content, where, BLOCKS[message.role])
        if not blocks:
            if message.role != "assistant":  # whose answer may be empty
                param = path_of(where)
                raise InvalidRequestError(f"{param}: must have at least one block", param)
            self.transcript.add_text("")
        elif message.role == "assistant":
            self._read_assistant(blocks, where)
        else:
            self._read_others(message.role, blocks, where)

    def _read_assistant(self, blocks: list[Any], where: Path) -> None:
        transcript = self.transcript
        for index, block in enumerate(blocks):
            match block:
                case TextBlock():
                    if index and isinstance(blocks[index - 1], TextBlock):
                        continue  # read together with the first text of its run
                    run = takewhile(lambda other: isinstance(other, TextBlock), blocks[index:])
                    transcript.add_text([_text(other.text) for other in run])
                case CompactionBlock():
                    transcript.add_text(block.content or "")
                case ThinkingBlock():
                    sealed = block.signature or ""
                    self._read_reasoning(block.thinking, sealed, (*where, index, "signature"))
                case RedactedThinkingBlock():
                    self._read_reasoning("", block.data, (*where, index))
                case ToolUseBlock():
                    arguments = json.dumps(block.input, ensure_ascii=False)
                    transcript.add_call(block.id, block.name, arguments)
                case HostedBlock():
                    self._ignored.add((*where, index))
                    self._find_references(block.model_extra or {})

    def _read_reasoning(self, shown: str, sealed: str, where: Path) -> None:
        """Add reasoning that is shown, or else what quire has sealed. What another server has
        sealed cannot be read."""
        text = shown
        if not shown and sealed:
            unsealed = unseal(sealed)
            if unsealed is None:
                self._ignored.add(where)
            text = unsealed or ""
        if text:
            self.transcript.add_reasoning(text)

    def _find_references(self, fields: Mapping[str, Any]) -> None:
        """Find the tools that another server's search has made known."""
        content = fields.get("content")
        found = content.get("tool_references") if isinstance(content, dict) else None
        for reference in found if isinstance(found, list) else ():
            if isinstance(reference, dict):
                self.referenced.add(str(reference.get("tool_name")))

    def _read_others(self, role: str, blocks: list[Any], where: Path) -> None:
        """Add a message of the user or the system: its texts, and each result of a tool as a
        message of its own."""
        texts: list[dict[str, str]] = []
        for index, block in enumerate(blocks):
            at = (*where, index)
            match block:
                case ToolResultBlock():
                    if texts:
                        self.transcript.add(role, texts)
                        texts = []
                    self._read_result(block, at)
                case ToolChangeBlock():
                    self._read_change(block, at)
                case _:
                    texts += self._readable(block, at)
        if texts:
            self.transcript.add(role, texts)

    def _read_result(self, block: ToolResultBlock, where: Path) -> None:
        where = (*where, "content")
        parts = [_text("Error:")] if block.is_error else []
        for index, part in enumerate(self._blocks(block.content or "", where, _IN_RESULT)):
            parts += self._readable(part, (*where, index))
        self.transcript.add("tool", parts, tool_call_id=block.tool_use_id)

    def _readable(self, block: Any, where: Path) -> list[dict[str, str]]:
        """Return a block of a user or of a tool's result as text parts."""
        match block:
            case TextBlock():
                return [_text(block.text)]
            case SearchResultBlock():
                texts = [part.text for part in block.content]
                return [_text(text) for text in (block.title, block.source, *texts)]
            case ToolReferenceBlock():
                self.referenced.add(block.tool_name)
                return [_text(f"The tool {block.tool_name} can be called now.")]
            case DocumentBlock() if block.source.get("type") in ("text", "content"):
                name = "data" if block.source["type"] == "text" else "content"
                where = (*where, "source", name)
                parts = self._blocks(block.source.get(name), where, {"text": TextBlock})
                heads = [text for text in (block.title, block.context) if text]
                return [_text(text) for text in (*heads, *(part.text for part in parts))]
            case DocumentBlock() if not _within_result(where):
                raise unsupported_type(block.source.get("type"), (*where, "source"))
        self._ignored.add(where)
        return [_text(OMITTED.format(block.type))]

    def _read_change(self, block: ToolChangeBlock, where: Path) -> None:
        tool = block.tool
        where = (*where, "tool")
        match tool.get("type"):
            case "tool_definition" if isinstance(tool.get("definition"), dict):
                self.defined.append((tool["definition"], (*where, "definition")))
            case "tool_reference" if isinstance(tool.get("name"), str):
                added = block.type == "tool_addition"
                (self.referenced if added else self.removed).add(tool["name"])
                (self.removed if added else self.referenced).discard(tool["name"])
            case kind:
                raise unsupported_type(kind, where)

    def _blocks(self, value: Any, where: Path, models: Mapping[str, type[Any]]) -> list[Any]:
        """Return the typed blocks of a message's content; a string is one block of text."""
        if isinstance(value, str):
            return [TextBlock(type="text", text=value)]
        blocks = []
        for index, block in enumerate(parts_of(value, where)):
            kind = block.get("type")
            if not isinstance(kind, str) or kind not in models:
                raise unsupported_type(kind, (*where, index))
            if models[kind] is HostedBlock:
                blocks.append(HostedBlock(**block))
            else:
                blocks.append(self._ignored.check(models[kind], block, (*where, index)))
        return blocks


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _within_result(where: Path) -> bool:
    """Whether a path is within a tool's result: messages[0].content[0].content[0]."""
    return where.count("content") > 1
