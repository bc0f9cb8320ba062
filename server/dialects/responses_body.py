"""The body of POST /v1/responses, and its translation to a chat completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from ...engine.errors import InvalidRequestError
from ..api.translation import (
    Content,
    ConversationBody,
    Path,
    Transcript,
    chat_body,
    content_of,
    texts_of,
    unsupported_type,
)
from ..requests.field_types import Fields, Label
from ..requests.protocol import ChatBody, check_types
from ..requests.unsupported import refuse_unsupported

MAX_METADATA = 16  # entries
MAX_METADATA_KEY = 64  # characters
MAX_METADATA_VALUE = 512  # characters
Include = Literal["message.output_text.logprobs"]

NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    ".function.": ".",
}
"""Fields of the chat and their names in this API; see `renamed`."""

ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "max_tool_calls": (),
    "moderation": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
}
"""Unsupported fields of this API, and the values that are accepted since they ask for nothing."""


def _check_input(value: Any) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or set(map(type, value)) != {dict}:
        raise ValueError("must be a string or a list of items")
    return value


def _check_metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not set(map(type, value.values())) <= {str}:
        raise ValueError("must be an object of strings")
    if len(value) > MAX_METADATA:
        raise ValueError(f"must have at most {MAX_METADATA} entries")
    if any(len(key) > MAX_METADATA_KEY or len(value[key]) > MAX_METADATA_VALUE for key in value):
        raise ValueError(
            f"keys must have at most {MAX_METADATA_KEY} characters, values {MAX_METADATA_VALUE}"
        )
    return value


class ResponseStreamOptions(Fields):
    include_obfuscation: Literal[False] | None = None


class ReasoningOptions(Fields):
    effort: Any = None
    summary: None = None
    generate_summary: None = None


class TextOptions(Fields):
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponseBody(ConversationBody):
    input: Annotated[Content, PlainValidator(_check_input)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Any = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: bool | None = None
    store: bool | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[Include], Field(fail_fast=True)] | None = None
    top_logprobs: int | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Annotated[dict[str, str] | None, PlainValidator(_check_metadata)] = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None


class MessageItem(Fields):
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Any


class FunctionCallItem(Fields):
    type: Literal["function_call"]
    id: str | None = None
    status: str | None = None
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(Fields):
    type: Literal["function_call_output"]
    id: str | None = None
    status: str | None = None
    call_id: str
    output: Any


class ReasoningItem(Fields):
    type: Literal["reasoning"]
    id: str | None = None
    status: str | None = None
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None
    encrypted_content: None = None


class FunctionTool(Fields):
    type: Literal["function"]
    name: Any
    description: Any = None
    parameters: Any = None
    strict: Any = None


ITEMS: dict[str, type[Fields]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
}
"""The types of items in a conversation."""


def check_body(fields: dict[str, Any], *, strict: bool) -> tuple[ResponseBody, list[str]]:
    """Return the typed body and its unknown fields. Raises InvalidRequestError."""
    fields = refuse_unsupported(fields, ASKS_FOR_NOTHING)
    body, ignored = check_types(ResponseBody, fields, strict=strict)
    for index, tool in enumerate(body.tools or ()):
        if tool.get("type") != "function":
            raise unsupported_type(tool.get("type"), ("tools", index))
        ignored += check_types(FunctionTool, tool, strict=strict, within=("tools", index))[1]
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options: needs stream", "stream_options")
    return body, ignored


def items_of(body: ResponseBody) -> list[dict[str, Any]]:
    """Return the input as items; a string is one message of the user."""
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": body.input}]
    items: list[dict[str, Any]] = body.input
    return items


def chat_of(
    body: ResponseBody, previous: Sequence[dict[str, Any]], *, strict: bool
) -> tuple[ChatBody, list[str]]:
    """Return the chat of the items of `previous` and of `body`, and the unknown fields in `body`.

    Raises InvalidRequestError.
    """
    transcript = Transcript()
    if body.instructions:
        transcript.add("system", body.instructions)
    for item in previous:
        _read(transcript, item, ("previous_response_id",), strict=False)
    ignored = []
    for index, item in enumerate(items_of(body)):
        ignored += _read(transcript, item, ("input", index), strict=strict)
    wants_logprobs = bool(body.include or body.top_logprobs)
    reasoning = body.reasoning or ReasoningOptions()
    fields = {
        **body.passed_on(),
        "messages": transcript.finished(),
        "stream": True,
        "max_completion_tokens": body.max_output_tokens,
        "tools": [_chat_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": _chat_tool_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _chat_format(body.text),
        "reasoning_effort": reasoning.effort,
        "logprobs": wants_logprobs or None,
        "top_logprobs": body.top_logprobs,
        "user": body.user,
    }
    return chat_body(fields, NAMES), ignored


def _read(
    transcript: Transcript, fields: dict[str, Any], where: Path, *, strict: bool
) -> list[str]:
    """Add an item to the transcript and return its unknown fields. Raises InvalidRequestError."""
    kind = fields.get("type", "message")
    model = ITEMS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise unsupported_type(kind, where)
    item, ignored = check_types(model, fields, strict=strict, within=where)
    match item:
        case MessageItem(role="assistant"):
            transcript.add_text(content_of(item.content, (*where, "content"), "output_text"))
        case MessageItem():
            content = content_of(item.content, (*where, "content"), "input_text")
            transcript.add(item.role, content)
        case FunctionCallItem():
            transcript.add_call(item.call_id, item.name, item.arguments)
        case FunctionCallOutputItem():
            content = content_of(item.output, (*where, "output"), "input_text")
            transcript.add("tool", content, tool_call_id=item.call_id)
        case ReasoningItem():
            # Read the reasoning itself if the item has it, and its summary otherwise.
            parts = texts_of(item.content or [], (*where, "content"), "reasoning_text")
            parts = parts or texts_of(item.summary or [], (*where, "summary"), "summary_text")
            transcript.add_reasoning("\n".join(part["text"] for part in parts))
    return ignored


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    names = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _chat_tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict):
        if choice.get("type") != "function":
            raise unsupported_type(choice.get("type"), ("tool_choice",))
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _chat_format(text: TextOptions | None) -> Any:
    if text is None or text.format is None or text.format.get("type") != "json_schema":
        return None if text is None else text.format
    schema = {name: value for name, value in text.format.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}
