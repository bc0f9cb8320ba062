"""The body of POST /v1/messages, and its translation to a chat completion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import takewhile
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from ...engine.errors import InvalidRequestError
from ..api.translation import (
    Content,
    ConversationBody,
    Path,
    Transcript,
    chat_body,
    parts_of,
    unsupported_type,
)
from ..requests.field_types import Fields
from ..requests.protocol import MAX_MESSAGES, ChatBody, check_types, path_of
from ..requests.unsupported import refuse_unsupported

MAX_USER_ID = 512
"""Maximum characters of `metadata.user_id`."""

NAMES = {
    "messages": "messages",
    "prompt": "messages",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
    ".function.parameters": ".input_schema",
    ".function.": ".",
}
"""Fields of the chat and their names in this API; see `renamed`."""

ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "compaction": (),
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "mcp_servers": ([],),
    "prefill": (),
    "speed": ("standard",),
    "thread": (),
}
"""Unsupported fields of this API, and the values that are accepted since they ask for nothing."""


class Metadata(Fields):
    user_id: Annotated[str, Field(max_length=MAX_USER_ID)] | None = None


class OutputConfig(Fields):
    format: dict[str, Any] | None = None
    effort: Any = None


class Thinking(Fields):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None
    display: Literal["omitted"] | None = None


class ToolChoice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CacheControl(Fields):
    """Accepted without effect, since every prefix is cached."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class MessageParam(Fields):
    role: Literal["user", "assistant"]
    content: Content


class CountTokensBody(ConversationBody):
    messages: Annotated[
        list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    system: Content = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesBody(CountTokensBody):
    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


class TextBlock(Fields):
    type: Literal["text"]
    text: str
    citations: None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(Fields):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Fields):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Fields):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Any = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class Tool(Fields):
    type: Literal["custom"] | None = None
    name: Any
    description: Any = None
    input_schema: Any
    strict: Any = None
    cache_control: CacheControl | None = None


BLOCKS: dict[str, dict[str, type[Fields]]] = {
    "user": {"text": TextBlock, "tool_result": ToolResultBlock},
    "assistant": {"text": TextBlock, "thinking": ThinkingBlock, "tool_use": ToolUseBlock},
}
"""The types of blocks in a message, by its role."""

Checked = TypeVar("Checked", bound=Fields)
Body = TypeVar("Body", bound=CountTokensBody)


def check_body(
    model: type[Body], fields: dict[str, Any], *, strict: bool
) -> tuple[Body, ChatBody, list[str]]:
    """Return the typed body, the chat that it asks for, and its unknown fields.

    Raises InvalidRequestError, which names the field.
    """
    body, ignored = check_types(model, refuse_unsupported(fields, ASKS_FOR_NOTHING), strict=strict)
    reader = _Reader(strict)
    for index, tool in enumerate(body.tools or ()):
        if tool.get("type") not in (None, "custom"):
            raise unsupported_type(tool["type"], ("tools", index))
        reader.check(Tool, tool, ("tools", index))
    if body.system is not None:
        reader.transcript.add("system", reader.texts(body.system, ("system",)))
    for index, message in enumerate(body.messages):
        reader.read(message, ("messages", index))
    messages = reader.transcript.finished()
    last = messages[-1]
    fields = {
        **body.passed_on(),
        **_generation_fields(body),
        **_thinking_fields(body),
        **_tool_fields(body),
        "messages": messages,
        "stream": True,
        # A last message of the assistant is the beginning of the answer.
        "continue_final_message": last["role"] == "assistant" and "tool_calls" not in last,
        "response_format": _chat_format(body.output_config),
    }
    return body, chat_body(fields, names_of(body)), ignored + reader.ignored


def _user(metadata: Metadata | None) -> str | None:
    """Hash the user id, since a chat's `user` must be shorter than what this API accepts."""
    if metadata is None or not metadata.user_id:
        return None
    return hashlib.sha256(metadata.user_id.encode()).hexdigest()


def names_of(body: CountTokensBody) -> dict[str, str]:
    """Return NAMES for this body: errors about the effort name the field that decided it."""
    disabled = body.thinking is not None and body.thinking.type == "disabled"
    return {**NAMES, "reasoning_effort": "thinking"} if disabled else NAMES


class _Reader:
    """Reads messages into a transcript and collects their unknown fields in `ignored`."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self.transcript = Transcript()
        self.ignored: list[str] = []

    def check(self, model: type[Checked], fields: dict[str, Any], where: Path) -> Checked:
        """Validate `fields`, which are at `where`. Raises InvalidRequestError."""
        checked, ignored = check_types(model, fields, strict=self._strict, within=where)
        self.ignored += ignored
        return checked

    def texts(self, value: Any, where: Path) -> list[dict[str, str]]:
        """Return content that may only be text as text parts of the chat."""
        blocks = self._blocks(value, where, {"text": TextBlock})
        return [{"type": "text", "text": block.text} for block in blocks]

    def read(self, message: MessageParam, where: Path) -> None:
        """Add a message to the transcript. Raises InvalidRequestError."""
        where = (*where, "content")
        transcript = self.transcript
        blocks = self._blocks(message.content, where, BLOCKS[message.role])
        if not blocks:
            param = path_of(where)
            raise InvalidRequestError(f"{param}: must have at least one block", param)
        for index, block in enumerate(blocks):
            match block:
                case TextBlock():
                    if index and isinstance(blocks[index - 1], TextBlock):
                        continue  # read together with the first text of its run
                    run = takewhile(lambda other: isinstance(other, TextBlock), blocks[index:])
                    content = [{"type": "text", "text": other.text} for other in run]
                    if message.role == "user":
                        transcript.add("user", content)
                    else:
                        transcript.add_text(content)
                case ThinkingBlock():
                    transcript.add_reasoning(block.thinking)
                case ToolUseBlock():
                    arguments = json.dumps(block.input, ensure_ascii=False)
                    transcript.add_call(block.id, block.name, arguments)
                case ToolResultBlock():
                    content = self.texts(block.content or "", (*where, index, "content"))
                    if block.is_error:
                        content = [{"type": "text", "text": "Error:"}, *content]
                    transcript.add("tool", content, tool_call_id=block.tool_use_id)

    def _blocks(self, value: Any, where: Path, models: Mapping[str, type[Any]]) -> list[Any]:
        """Return the typed blocks of a message's content; a string is one block of text."""
        if isinstance(value, str):
            return [TextBlock(type="text", text=value)]
        blocks = []
        for index, block in enumerate(parts_of(value, where)):
            kind = block.get("type")
            if not isinstance(kind, str) or kind not in models:
                raise unsupported_type(kind, (*where, index))
            blocks.append(self.check(models[kind], block, (*where, index)))
        return blocks


def _generation_fields(body: CountTokensBody) -> dict[str, Any]:
    if not isinstance(body, MessagesBody):
        return {}
    return {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences or body.stop,
        "user": _user(body.metadata),
    }


def _thinking_fields(body: CountTokensBody) -> dict[str, Any]:
    effort = body.output_config.effort if body.output_config is not None else None
    thinking = body.thinking
    if thinking is None:
        return {"reasoning_effort": effort}
    return {
        "reasoning_effort": "none" if thinking.type == "disabled" else effort,
        "thinking_token_budget": thinking.budget_tokens,
        "include_reasoning": False if thinking.display == "omitted" else None,
    }


def _tool_fields(body: CountTokensBody) -> dict[str, Any]:
    choice = body.tool_choice
    if choice is not None:
        mode = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type)
        named = {"type": "function", "function": {"name": choice.name}}
    return {
        "tools": [_chat_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": None if choice is None else mode or named,
        "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
    }


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
        "strict": tool.get("strict"),
    }
    given = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": given}


def _chat_format(config: OutputConfig | None) -> Any:
    if config is None or config.format is None:
        return None
    if config.format.get("type") != "json_schema":
        raise unsupported_type(config.format.get("type"), ("output_config", "format"))
    schema = {"name": "output", "schema": config.format.get("schema"), "strict": True}
    return {"type": "json_schema", "json_schema": schema}
