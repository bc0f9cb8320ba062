"""What the other chat APIs share: bodies become chat completions, and choices become answers.

A body in another API is rewritten as the body of a chat completion and validated as one, so these
APIs serve and refuse exactly what chat completions do. Answers are written from the choices of the
chat's stream, whether they are streamed or not.

    body ──▶ chat_body ──▶ Chat ──▶ choices ──▶ pieces_of ──▶ BlockWriter ──▶ events
"""

from __future__ import annotations

import asyncio
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import WithJsonSchema

from ...engine.errors import EngineDeadError, InvalidRequestError
from ..json_text import encode_line
from ..requests.chat_prompt import check_chat, encode_chat, settings_without_effect
from ..requests.field_types import Fields
from ..requests.protocol import ChatBody, path_of, validate
from ..requests.state import ServerState
from .chat import Chat
from .whole_answers import encode_large, is_large

PASSED_ON = (
    "model", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "min_tokens",
    "ignore_eos", "cache_salt", "priority", "timeout", "chat_template_kwargs",
)  # fmt: skip
"""Fields with the same meaning in all APIs; the chat completion checks them."""

Path = tuple[int | str, ...]
"""The place of a field in a body: names and indices."""

Content = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]
"""Text or typed parts; the reader decides which."""


class ConversationBody(Fields):
    """The fields of PASSED_ON, unchecked."""

    model: str | None = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    seed: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    cache_salt: Any = None
    priority: Any = None
    timeout: Any = None
    chat_template_kwargs: Any = None

    def passed_on(self) -> dict[str, Any]:
        """Return the fields of PASSED_ON that are not None."""
        return {name: getattr(self, name) for name in PASSED_ON if getattr(self, name) is not None}


def chat_body(fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatBody:
    """Validate `fields` as the body of a chat completion, leaving out those that are None.

    Raises InvalidRequestError, which names the client's fields; see `renamed` for `names`.
    """
    with renamed(names):
        given = {name: value for name, value in fields.items() if value is not None}
        body, _ = validate(ChatBody, given, strict=True)
        return body


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Make errors about a field of the chat name the client's field instead.

    `names` maps the beginning of a path in the chat to a path in the client's body, or a part of
    a path that begins with a dot to its replacement.
    """
    try:
        yield
    except InvalidRequestError as error:
        param, message = renamed_path(error.param or "", names), error.message
        for ours, theirs in names.items():
            if not ours.startswith(".") and (error.param or "").startswith(ours):
                message = message.replace(ours, theirs)
        if param == (error.param or ""):
            raise
        changed = copy.copy(error)
        changed.message, changed.param = message.replace(str(error.param), param), param
        changed.args = (changed.message,)
        raise changed from error


def renamed_path(path: str, names: Mapping[str, str]) -> str:
    """Return the client's name of a field of the chat; see `renamed` for `names`."""
    for ours, theirs in names.items():
        if ours.startswith("."):
            path = path.replace(ours, theirs)
        elif path.startswith(ours):
            path = theirs
    return path


def without_effect(chat: Chat, names: Mapping[str, str]) -> list[str]:
    """Return the client's names of the fields that have no effect with this model."""
    return [renamed_path(path, names) for path in chat.job.ignored]


async def count_tokens(
    state: ServerState, chat: ChatBody, names: Mapping[str, str]
) -> tuple[int, list[str]]:
    """Return the number of tokens of a chat as a prompt, and the client's names of the fields that
    have no effect with this model. Raises QuireError."""
    with renamed(names):
        check_chat(state, chat)
        unread = await settings_without_effect(state, chat)
        prompt = await encode_chat(state, chat, None, state.engine.info.max_model_len)
    return len(prompt.token_ids), [renamed_path(path, names) for path in unread]


def parts_of(value: Any, where: Path) -> list[dict[str, Any]]:
    """Check that `value` is a list of objects. Raises InvalidRequestError."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        param = path_of(where)
        raise InvalidRequestError(f"{param}: must be a string or a list of objects", param)
    return value


def unsupported_type(kind: Any, where: Path) -> InvalidRequestError:
    """Make the error for an item, part or tool of a type that is not supported."""
    param = path_of((*where, "type"))
    return InvalidRequestError(
        f"{param}: {ascii(kind)[:64]} is not supported by this server", param
    )


class Transcript:
    """Collects a chat's messages.

    Consecutive reasoning, text and calls of the assistant become one message, as chat templates
    expect. Text or reasoning after calls belongs to the message of these calls, because their
    results must come next.
    """

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []

    def add(self, role: str, content: Any, **fields: Any) -> None:
        """Add a message of anyone but the assistant."""
        self._messages.append({"role": role, "content": content, **fields})

    def add_text(self, content: Any) -> None:
        """Add text of the assistant: a string or text parts."""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turn = self._turn("content")
        turn["content"] = [*turn.get("content", ()), *parts]

    def add_reasoning(self, text: str) -> None:
        """Add reasoning of the assistant."""
        turn = self._turn("content", "reasoning")
        turn["reasoning"] = f"{turn['reasoning']}\n{text}" if "reasoning" in turn else text

    def add_call(self, call_id: str, name: str, arguments: str) -> None:
        """Add a tool call of the assistant; `arguments` is JSON, if it is not broken."""
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self._turn().setdefault("tool_calls", []).append(call)

    def _turn(self, *ended_by: str) -> dict[str, Any]:
        """Return the last message if it is the assistant's and has calls, or none of the fields
        `ended_by`. Otherwise, begin a new message of the assistant."""
        last = self._messages[-1] if self._messages else {"role": None}
        ended = "tool_calls" not in last and any(name in last for name in ended_by)
        if last["role"] != "assistant" or ended:
            last = {"role": "assistant"}
            self._messages.append(last)
        return last

    def finished(self) -> list[dict[str, Any]]:
        """Return all messages; one without content or calls gets empty content."""
        for message in self._messages:
            if "tool_calls" not in message:
                message.setdefault("content", "")
        return self._messages

    @property
    def last(self) -> dict[str, Any]:
        """The last message; empty if there is none."""
        return self._messages[-1] if self._messages else {}


class Piece(NamedTuple):
    """A stretch of a model's output of one kind.

    The `text` of a call is a part of its arguments' JSON; `call` is its index, and its first piece
    has its `id` and `name`. `logprobs` are in the shape of a chat completion.
    """

    kind: Literal["reasoning", "text", "call"]
    text: str
    logprobs: Sequence[dict[str, Any]] = ()
    call: int = 0
    id: str = ""
    name: str = ""


def pieces_of(choice: Mapping[str, Any]) -> Iterator[Piece]:
    """Yield the pieces of one entry of `choices`. Raises EngineDeadError if it was aborted."""
    delta = choice["delta"]
    if choice["finish_reason"] == "abort":
        raise EngineDeadError("the engine aborted the request")
    if delta.get("reasoning"):
        yield Piece("reasoning", delta["reasoning"])
    logprobs = (choice["logprobs"] or {}).get("content") or ()
    if delta.get("content") or (logprobs and not delta):
        yield Piece("text", delta.get("content") or "", logprobs)
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        yield Piece(
            "call",
            function.get("arguments") or "",
            call=call["index"],
            id=call.get("id") or "",
            name=function.get("name") or "",
        )


Event = dict[str, Any]
"""A typed event; its member `type` names it."""


def sse(event: Event) -> bytes:
    """Encode a typed event as a server-sent event."""
    return b"%b%b\n\n" % (_head(event), encode_line(event))


def _head(event: Event) -> bytes:
    return f"event: {event['type']}\ndata: ".encode()


async def event_of(event: Event) -> bytes:
    """Encode a typed event like `sse`; a large one in a thread."""
    if event["type"].endswith(".delta") or not is_large(event):
        return sse(event)
    content = await asyncio.to_thread(encode_large, event, _head(event))
    content += b"\n\n"
    return bytes(content)


class BlockWriter(ABC):
    """Turns a choice's pieces into events of consecutive blocks.

    A block is a stretch of reasoning, a stretch of text, or one call. An event may share objects
    with the writer, so it is valid only until the next one is requested.
    """

    def __init__(self) -> None:
        self._open: tuple[str, int] | None = None
        self._early_logprobs: list[dict[str, Any]] = []

    def feed(self, choice: Mapping[str, Any]) -> Iterator[Event]:
        """Yield the events for one entry of the chat's `choices`."""
        for piece in pieces_of(choice):
            key = (piece.kind, piece.call)
            if key != self._open:
                if piece.kind == "text" and not piece.text:
                    self._early_logprobs += piece.logprobs  # the parser still holds their text back
                    continue
                yield from self.close()
                self._open = key
                yield from self.open_block(piece)
                if piece.kind == "text":
                    piece = piece._replace(logprobs=[*self._early_logprobs, *piece.logprobs])
                self._early_logprobs.clear()
            if piece.text or piece.logprobs:
                yield from self.extend_block(piece)

    def close(self, status: str = "completed") -> Iterator[Event]:
        """End the open block, if there is one, as "completed" or "incomplete"."""
        if self._open is not None:
            self._open = None
            yield from self.close_block(status)

    @abstractmethod
    def open_block(self, first: Piece) -> Iterator[Event]:
        """Yield the events that begin a block; `first` is its first piece."""

    @abstractmethod
    def extend_block(self, piece: Piece) -> Iterator[Event]:
        """Yield the events that add `piece` to the open block."""

    @abstractmethod
    def close_block(self, status: str) -> Iterator[Event]:
        """Yield the events that end the open block."""
