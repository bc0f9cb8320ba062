"""What the other APIs of conversations share: into a chat's fields and out of its choices.

A request in another API is written as the fields of a chat completion, and validated as such; so
whatever chat completions serve or refuse, these serve or refuse alike. Answers are written from the
choices of the chat's stream, whether they are streamed or not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, WithJsonSchema

from ...engine.errors import EngineDeadError, InvalidRequestError
from ..json_text import encode_json
from ..requests.protocol import ChatBody, path_of, validate

PASSED_ON = (
    "model", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "min_tokens",
    "ignore_eos", "cache_salt", "priority", "timeout", "chat_template_kwargs",
)  # fmt: skip
"""Fields that mean in every API what they mean in a chat completion, and are checked there."""

Path = tuple[int | str, ...]
"""Where a field stands: names and indices."""


Content = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]
"""Text or typed parts, told apart where they are read."""


class Fields(BaseModel):
    """A strict body; fields that it does not know are kept and reported by `check_types`."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class ConversationBody(Fields):
    """PASSED_ON, as they came."""

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
        return {name: getattr(self, name) for name in PASSED_ON if getattr(self, name) is not None}


def chat_body(fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatBody:
    """The chat body of `fields`, those that are None left out.

    `names` is that of `renamed`. Raises InvalidRequestError in the client's words.
    """
    with renamed(names):
        given = {name: value for name, value in fields.items() if value is not None}
        body, _ = validate(ChatBody, given, strict=True)
        return body


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a field of the chat name the client's field instead.

    `names` has the beginning of a chat's path and the client's path, or a part that begins with a
    dot and what replaces it.
    """
    try:
        yield
    except InvalidRequestError as error:
        param, message = error.param or "", error.message
        for ours, theirs in names.items():
            if ours.startswith("."):
                param = param.replace(ours, theirs)
            elif param.startswith(ours):
                param, message = theirs, message.replace(ours, theirs)
        if param == (error.param or ""):
            raise
        raise type(error)(message.replace(str(error.param), param), param) from error


def content_of(value: Any, where: Path, kind: str) -> str | list[dict[str, str]]:
    """Content of a message as a chat has it: a string, or parts of text as `texts_of`."""
    return value if isinstance(value, str) else texts_of(value, where, kind)


def texts_of(value: Any, where: Path, kind: str) -> list[dict[str, str]]:
    """Parts that are all of the type `kind`, as a chat's parts of text.

    Raises InvalidRequestError naming the part.
    """
    parts = []
    for index, part in enumerate(parts_of(value, where)):
        text = part.get("text")
        if part.get("type") != kind:
            raise unsupported_type(part.get("type"), (*where, index))
        if not isinstance(text, str):
            param = path_of((*where, index, "text"))
            raise InvalidRequestError(f"{param}: must be a string", param)
        parts.append({"type": "text", "text": text})
    return parts


def parts_of(value: Any, where: Path) -> list[dict[str, Any]]:
    """A content that is no string. Raises InvalidRequestError."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        param = path_of(where)
        raise InvalidRequestError(f"{param}: must be a string or a list of objects", param)
    return value


def unsupported_type(kind: Any, where: Path) -> InvalidRequestError:
    """The refusal of an item, a part or a tool of a type that is not served."""
    param = path_of((*where, "type"))
    return InvalidRequestError(
        f"{param}: {ascii(kind)[:64]} is not supported by this server", param
    )


class Transcript:
    """A chat's messages. What an assistant said in a row, its reasoning, its text and its calls, is
    one message, as chat templates expect it."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []

    def add(self, role: str, content: Any, **fields: Any) -> None:
        self._messages.append({"role": role, "content": content, **fields})

    def add_text(self, content: Any) -> None:
        """The assistant's."""
        self._turn("content", "tool_calls")["content"] = content

    def add_reasoning(self, text: str) -> None:
        self._turn("content", "tool_calls", "reasoning")["reasoning"] = text

    def add_call(self, call_id: str, name: str, arguments: str) -> None:
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self._turn().setdefault("tool_calls", []).append(call)

    def _turn(self, *ended_by: str) -> dict[str, Any]:
        """The assistant's message at the end, unless it has one of these fields: a new one then."""
        last = self._messages[-1] if self._messages else {"role": None}
        if last["role"] != "assistant" or any(name in last for name in ended_by):
            last = {"role": "assistant"}
            self._messages.append(last)
        return last

    def finished(self) -> list[dict[str, Any]]:
        for message in self._messages:
            if "tool_calls" not in message:
                message.setdefault("content", "")
        return self._messages


class Piece(NamedTuple):
    """Some of what a model said. `text` of a call is the JSON of its arguments; `id` and `name`
    come with its first piece. `logprobs` are those of a chat's stream."""

    kind: Literal["reasoning", "text", "call"]
    text: str
    logprobs: Sequence[dict[str, Any]] = ()
    call: int = 0
    id: str = ""
    name: str = ""


def pieces_of(choice: Mapping[str, Any]) -> Iterator[Piece]:
    """The pieces in one of the chat's choices. Raises EngineDeadError where it was aborted."""
    delta = choice["delta"]
    if choice["finish_reason"] == "abort":
        raise EngineDeadError("the engine gave the request up")
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
"""A typed event; `type` names it."""


def sse(event: Event) -> bytes:
    """A typed event on the wire."""
    return f"event: {event['type']}\ndata: ".encode() + encode_json(event) + b"\n\n"


class BlockWriter(ABC):
    """Cuts a choice's pieces into blocks, one after the other: a stretch of reasoning or of text,
    or one call. Events are valid until the next is asked for."""

    def __init__(self) -> None:
        self._open: tuple[str, int] | None = None
        self._early_logprobs: list[dict[str, Any]] = []

    def feed(self, choice: Mapping[str, Any]) -> Iterator[Event]:
        """The events of one of the chat's choices."""
        for piece in pieces_of(choice):
            key = (piece.kind, piece.call)
            if key != self._open:
                if piece.kind == "text" and not piece.text:
                    self._early_logprobs += piece.logprobs  # their text is still held back
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
        """End the block that is open, if one is; it is "completed", or "incomplete"."""
        if self._open is not None:
            self._open = None
            yield from self.close_block(status)

    @abstractmethod
    def open_block(self, first: Piece) -> Iterator[Event]: ...

    @abstractmethod
    def extend_block(self, piece: Piece) -> Iterator[Event]: ...

    @abstractmethod
    def close_block(self, status: str) -> Iterator[Event]: ...
