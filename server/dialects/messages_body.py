"""The body of POST /v1/messages, and its translation to a chat completion."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import Field

from ...engine.errors import InvalidRequestError
from ..api.translation import Content, ConversationBody, Path, chat_body, unsupported_type
from ..api.whole_answers import in_thread_if, is_large
from ..requests.field_types import Fields, ReasoningEffort, ToolName, ToolParameters
from ..requests.protocol import ChatBody
from ..requests.unsupported import refuse_unsupported
from .hints import Ignored
from .messages_blocks import CacheControl, Messages, Reader

MAX_USER_ID = 512
"""Maximum characters of `metadata.user_id`."""

NAMES = {
    "messages": "messages",
    "prompt": "messages",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
}
"""Fields of the chat and their names in this API; see `renamed`."""

ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "container": (),
    "prefill": (),
    "thread": (),
}
"""Unsupported fields of this API, and the values that are accepted since they ask for nothing."""


class Metadata(Fields):
    """Who asks."""

    user_id: Annotated[str, Field(max_length=MAX_USER_ID)] | None = None


class OutputConfig(Fields):
    """The structure of the answer, and the effort that goes into it."""

    format: dict[str, Any] | None = None
    effort: Any = None


class Thinking(Fields):
    """Whether the model reasons, how much, and what is shown of it."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class ToolChoice(Fields):
    """Whether the model may or must call a tool, and which one."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountTokensBody(ConversationBody):
    """A conversation as a prompt, with the tools that it offers."""

    messages: Messages
    system: Content = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    # Hints: see `_name_hints`.
    context_management: Any = None
    mcp_servers: Any = None
    speed: Any = None

    @property
    def omits_thinking(self) -> bool:
        """Whether reasoning is returned sealed, and not shown."""
        return self.thinking is not None and self.thinking.display == "omitted"


class MessagesBody(CountTokensBody):
    """A conversation to answer."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Any = None


class Tool(Fields):
    """A tool that the client runs, with the JSON schema of its input."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: ToolParameters
    strict: bool | None = None
    defer_loading: bool | None = None
    eager_input_streaming: Any = None  # arguments are streamed as they come in any case
    cache_control: CacheControl | None = None


Body = TypeVar("Body", bound=CountTokensBody)


async def read_body(
    model: type[Body], fields: dict[str, Any], *, strict: bool
) -> tuple[Body, ChatBody, Ignored]:
    """Return the typed body, the chat that it asks for, and its fields without effect. A large body
    is read in a thread.

    Raises InvalidRequestError, which names the field.
    """
    return await in_thread_if(is_large(fields), lambda: _checked(model, fields, strict=strict))


def _checked(
    model: type[Body], fields: dict[str, Any], *, strict: bool
) -> tuple[Body, ChatBody, Ignored]:
    ignored = Ignored(strict=strict)
    body = ignored.check(model, refuse_unsupported(fields, ASKS_FOR_NOTHING))
    _name_hints(body, ignored)
    reader = Reader(ignored)
    if body.system is not None:
        reader.read_system(body.system)
    for index, message in enumerate(body.messages):
        reader.read(message, ("messages", index))
    tools = _offered_tools(body, reader, ignored)
    transcript = reader.transcript
    # A last message of the assistant is the beginning of the answer, if it has text to continue.
    last = transcript.last if body.messages[-1].role == "assistant" else {}
    begun = any(part["text"] for part in last.get("content", ()))
    fields = {
        **body.passed_on(),
        **_generation_fields(body),
        **_thinking_fields(body, ignored),
        **_choice_fields(body),
        "tools": tools or None,
        "messages": transcript.finished(),
        "stream": True,
        "continue_final_message": begun and "tool_calls" not in last,
        "response_format": _chat_format(body.output_config),
    }
    return body, chat_body(fields, names_of(body)), ignored


def effort_path(body: CountTokensBody) -> Path:
    """Return the path of the field that decides the reasoning effort."""
    disabled = body.thinking is not None and body.thinking.type == "disabled"
    return ("thinking",) if disabled else ("output_config", "effort")


def names_of(body: CountTokensBody) -> dict[str, str]:
    """Return NAMES for this body: errors about the effort name the field that decided it."""
    return {**NAMES, "reasoning_effort": ".".join(map(str, effort_path(body)))}


def _name_hints(body: CountTokensBody, ignored: Ignored) -> None:
    ignored.add(("context_management",), body.context_management, ({}, {"edits": []}))
    ignored.add(("mcp_servers",), body.mcp_servers, ([],))
    ignored.add(("speed",), body.speed, ("standard",))
    if isinstance(body, MessagesBody):
        ignored.add(("service_tier",), body.service_tier, ("auto", "standard_only"))


def _user(metadata: Metadata | None) -> str | None:
    """Hash the user id, since a chat's `user` must be shorter than what this API accepts."""
    if metadata is None or not metadata.user_id:
        return None
    return hashlib.sha256(metadata.user_id.encode()).hexdigest()


def _generation_fields(body: CountTokensBody) -> dict[str, Any]:
    if not isinstance(body, MessagesBody):
        return {}
    return {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences or body.stop,
        "user": _user(body.metadata),
    }


def _thinking_fields(body: CountTokensBody, ignored: Ignored) -> dict[str, Any]:
    effort = body.output_config.effort if body.output_config is not None else None
    if effort == "max" and effort not in get_args(ReasoningEffort):
        effort = "xhigh"
    thinking = body.thinking
    if thinking is None:
        return {"reasoning_effort": effort}
    budget = thinking.budget_tokens
    if "thinking_token_budget" not in ChatBody.model_fields:
        ignored.add(("thinking", "budget_tokens"), budget)
        budget = None
    return {
        "reasoning_effort": "none" if thinking.type == "disabled" else effort,
        "thinking_token_budget": budget,
    }


def _offered_tools(body: CountTokensBody, reader: Reader, ignored: Ignored) -> list[dict[str, Any]]:
    """Return the tools that the model sees.

    Tools that Anthropic defines or runs are left out. A tool with `defer_loading` is left out until
    a message refers to it, unless a tool of Anthropic's would have had to find it. Raises
    InvalidRequestError.
    """
    given = [(tool, ("tools", index)) for index, tool in enumerate(body.tools or ())]
    chosen = body.tool_choice.name if body.tool_choice is not None else None
    kinds = [str(tool.get("type")) for tool, _ in given]
    all_shown = any(kind.startswith("tool_search_tool_") for kind in kinds)
    tools = []
    for tool, where in [*given, *reader.defined]:
        kind, name = tool.get("type"), tool.get("name")
        if kind not in (None, "custom"):
            if isinstance(chosen, str) and name == chosen:
                raise unsupported_type(kind, where)
            ignored.add(where)
            continue
        checked = ignored.check(Tool, tool, where)
        hidden = checked.defer_loading and not all_shown and name not in reader.referenced
        if not hidden and name not in reader.removed:
            tools.append(_chat_tool(tool))
            forced = body.tool_choice is not None and body.tool_choice.type in ("any", "tool")
            if checked.strict and not forced:
                ignored.mention((*where, "strict"))
    return tools


def _choice_fields(body: CountTokensBody) -> dict[str, Any]:
    choice = body.tool_choice
    if choice is None:
        return {}
    mode = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type)
    named = {"type": "function", "function": {"name": choice.name}}
    if mode is None and choice.name is None:
        raise InvalidRequestError("tool_choice.name is missing", "tool_choice.name")
    return {
        "tool_choice": mode or named,
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
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
