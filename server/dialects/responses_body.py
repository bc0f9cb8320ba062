"""The body of POST /v1/responses, and its translation to a chat completion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import Field, PlainValidator

from ...engine.errors import InvalidRequestError
from ..api.translation import Content, ConversationBody, chat_body
from ..api.whole_answers import in_thread_if, is_large
from ..requests.field_types import Fields, OptionalLabel, ReasoningEffort
from ..requests.protocol import ChatBody
from ..requests.unsupported import refuse_unsupported
from .hints import Ignored
from .responses_items import ItemReader
from .responses_tools import Tools

MAX_METADATA = 16  # entries
MAX_METADATA_KEY = 64  # characters
MAX_METADATA_VALUE = 512  # characters
INCLUDE_LOGPROBS = "message.output_text.logprobs"
INCLUDE_SEALED = "reasoning.encrypted_content"

NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of the chat and their names in this API; see `renamed`."""

ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {"prompt": (), "moderation": ()}
"""Unsupported fields of this API, and the values that are accepted since they ask for nothing."""


def _check_input(value: Any) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or set(map(type, value)) != {dict}:
        raise ValueError("must be a string or a list of items")
    return value


def _check_conversation(value: Any) -> str | None:
    name = value.get("id") if isinstance(value, dict) else value
    if value is not None and not isinstance(name, str):
        raise ValueError('must be an id or {"id": …}')
    return name


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


Metadata = Annotated[dict[str, str] | None, PlainValidator(_check_metadata)]


class ResponseStreamOptions(Fields):
    """Options of a streamed response."""

    include_obfuscation: bool | None = None


class ReasoningOptions(Fields):
    """How much the model reasons, and what is shown of it."""

    effort: Any = None
    summary: Any = None
    generate_summary: Any = None


class TextOptions(Fields):
    """The structure of the answer's text."""

    format: dict[str, Any] | None = None
    verbosity: Any = None


class InputTokensBody(ConversationBody):
    """A conversation as items, and the tools that it offers."""

    input: Annotated[Content, PlainValidator(_check_input)]
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Annotated[str | None, PlainValidator(_check_conversation)] = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Any = None  # a hint: see `_name_hints`

    @property
    def continued(self) -> str:
        """The id of what is continued, a response or conversation, or the first item that the input
        refers to; empty if there is none."""
        found = self.previous_response_id or self.conversation
        return found or next((item_id for _, item_id in self.references()), "")

    def references(self) -> Iterator[tuple[int, str]]:
        """Yield the place and the id of each item that the input only refers to."""
        for place, item in enumerate(self.input if isinstance(self.input, list) else ()):
            if item.get("type") == "item_reference":
                yield place, str(item.get("id"))


class ResponseBody(InputTokensBody):
    """A conversation to answer, and how to answer it."""

    max_output_tokens: Any = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: bool | None = None
    store: bool | None = None
    include: Annotated[list[str], Field(fail_fast=True)] | None = None
    top_logprobs: int | None = None
    metadata: Metadata = None
    user: OptionalLabel = None
    safety_identifier: OptionalLabel = None
    prompt_cache_key: OptionalLabel = None
    # Hints: see `_name_hints`.
    service_tier: Any = None
    context_management: Any = None
    max_tool_calls: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    @property
    def shows_logprobs(self) -> bool:
        """Whether the text's log-probabilities are returned."""
        return INCLUDE_LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def seals_reasoning(self) -> bool:
        """Whether reasoning is also returned sealed."""
        return INCLUDE_SEALED in (self.include or ())


Body = TypeVar("Body", bound=InputTokensBody)


async def read_body(
    model: type[Body], fields: dict[str, Any], *, strict: bool
) -> tuple[Body, Ignored]:
    """Return the typed body and its fields without effect. A large one is checked in a thread.
    Raises InvalidRequestError."""
    return await in_thread_if(is_large(fields), lambda: _checked(model, fields, strict=strict))


def _checked(model: type[Body], fields: dict[str, Any], *, strict: bool) -> tuple[Body, Ignored]:
    ignored = Ignored(strict=strict)
    body = ignored.check(model, refuse_unsupported(fields, ASKS_FOR_NOTHING))
    _name_hints(body, ignored)
    if body.conversation is not None and body.previous_response_id is not None:
        raise InvalidRequestError(
            "conversation: cannot be combined with previous_response_id", "conversation"
        )
    if isinstance(body, ResponseBody):
        if body.stream_options is not None and not body.stream:
            raise InvalidRequestError("stream_options: needs stream", "stream_options")
        _name_hints_of_answer(body, ignored)
    return body, ignored


def _name_hints(body: InputTokensBody, ignored: Ignored) -> None:
    ignored.add(("truncation",), body.truncation, ("disabled",))
    reasoning = body.reasoning or ReasoningOptions()
    ignored.add(("reasoning", "summary"), reasoning.summary)
    ignored.add(("reasoning", "generate_summary"), reasoning.generate_summary)
    ignored.add(("text", "verbosity"), body.text and body.text.verbosity, ("medium",))


def _name_hints_of_answer(body: ResponseBody, ignored: Ignored) -> None:
    ignored.add(("service_tier",), body.service_tier, ("auto", "default"))
    ignored.add(("context_management",), body.context_management, ([],))
    ignored.add(("max_tool_calls",), body.max_tool_calls)
    ignored.add(("prompt_cache_options",), body.prompt_cache_options)
    ignored.add(("prompt_cache_retention",), body.prompt_cache_retention, ("in_memory",))
    obfuscation = body.stream_options and body.stream_options.include_obfuscation
    ignored.add(("stream_options", "include_obfuscation"), obfuscation, (False,))
    for index, name in enumerate(body.include or ()):
        ignored.add(("include", index), name, (INCLUDE_LOGPROBS, INCLUDE_SEALED))


def items_of(body: InputTokensBody) -> list[dict[str, Any]]:
    """Return the input as items; a string is one message of the user."""
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": body.input}]
    items: list[dict[str, Any]] = body.input
    return items


async def read_chat(
    body: InputTokensBody, previous: Sequence[dict[str, Any]], ignored: Ignored
) -> tuple[ChatBody, Tools]:
    """Return the chat of the items of `previous` and of `body`, and its tools. Large ones are read
    in a thread. Raises InvalidRequestError."""
    large = is_large(previous) or is_large(body.input)
    return await in_thread_if(large, lambda: _chat_of(body, previous, ignored))


def _chat_of(
    body: InputTokensBody, previous: Sequence[dict[str, Any]], ignored: Ignored
) -> tuple[ChatBody, Tools]:
    tools = Tools(ignored)
    tools.add(body.tools or (), ("tools",))
    reader = ItemReader(tools, ignored)
    if body.instructions:
        reader.transcript.add("system", body.instructions)
    # What earlier requests have said without effect is not named again.
    earlier = ItemReader(tools, Ignored(strict=False))
    earlier.transcript = reader.transcript
    for item in previous:
        earlier.read(item, ("conversation" if body.conversation else "previous_response_id",))
    for index, item in enumerate(items_of(body)):
        reader.read(item, ("input", index))
    effort = body.reasoning.effort if body.reasoning is not None else None
    if effort == "max" and effort not in get_args(ReasoningEffort):
        effort = "xhigh"
    choice = tools.choose(body.tool_choice)
    fields = {
        **body.passed_on(),
        "messages": reader.transcript.finished(),
        "stream": True,
        "tools": tools.functions or None,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _chat_format(body.text),
        "reasoning_effort": effort,
    }
    if isinstance(body, ResponseBody):
        fields["max_completion_tokens"] = body.max_output_tokens
        fields["logprobs"] = body.shows_logprobs or None
        fields["top_logprobs"] = body.top_logprobs
        fields["user"] = body.user
    return chat_body(fields, NAMES), tools


def _chat_format(text: TextOptions | None) -> Any:
    if text is None or text.format is None or text.format.get("type") != "json_schema":
        return None if text is None else text.format
    schema = {name: value for name, value in text.format.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}
