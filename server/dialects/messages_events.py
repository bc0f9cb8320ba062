"""The answer of POST /v1/messages: the message and its events, written from a chat's choices."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from pydantic_core import from_json

from ..api.chat import Chat
from ..api.translation import BlockWriter, Event, Piece
from ..templates.call_arguments import RAW_ARGUMENTS
from .sealed import seal

PING: Event = {"type": "ping"}
"""The event that keeps silent connections open."""
_DELTA_OF = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageWriter(BlockWriter):
    """Builds `message` while the chat runs, and the events that report its progress.

    With `omits_thinking`, a thinking block has no text, and its signature holds the sealed
    reasoning.
    """

    def __init__(self, message_id: str, model: str, *, omits_thinking: bool = False) -> None:
        super().__init__()
        self._omits_thinking = omits_thinking
        self.message: dict[str, Any] = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": None,
        }
        self._kind = ""
        self._block: dict[str, Any] = {}
        self._texts: list[str] = []

    async def events(self, chat: Chat) -> AsyncGenerator[Event, None]:
        """Run `chat` and yield all events, from the first to the last. Raises QuireError."""
        message = self.message
        begun = False
        async with aclosing(chat.choices()) as choices:
            async for choice in choices:
                if not begun:
                    begun = True
                    message["usage"] = _usage(chat.generation.usage())
                    yield {"type": "message_start", "message": message}
                    yield PING
                for event in self.feed(choice):
                    yield event
                if choice["finish_reason"] is not None:
                    message |= _stop(choice)
        for event in self.close():
            yield event
        message["usage"] = _usage(chat.generation.usage())
        delta = {name: message[name] for name in ("stop_reason", "stop_sequence")}
        yield {"type": "message_delta", "delta": delta, "usage": message["usage"]}
        yield {"type": "message_stop"}

    def open_block(self, first: Piece) -> Iterator[Event]:
        block: dict[str, Any]
        match first.kind:
            case "text":
                block = {"type": "text", "text": "", "citations": None}
            case "reasoning":
                block = {"type": "thinking", "thinking": "", "signature": ""}
            case "call":
                block = {"type": "tool_use", "id": first.id, "name": first.name, "input": {}}
        self._kind, self._block, self._texts = first.kind, block, []
        yield self._event("content_block_start", content_block=block)

    def extend_block(self, piece: Piece) -> Iterator[Event]:
        self._texts.append(piece.text)
        if piece.kind == "reasoning" and self._omits_thinking:
            return
        kind, name = _DELTA_OF[piece.kind]
        yield self._event("content_block_delta", delta={"type": kind, name: piece.text})

    def close_block(self, status: str) -> Iterator[Event]:
        block, text = self._block, "".join(self._texts)
        if self._kind == "call":
            block["input"] = _input_of(text)
        elif self._kind == "reasoning":
            block["signature"] = seal(text if self._omits_thinking else "")
            block["thinking"] = "" if self._omits_thinking else text
            delta = {"type": "signature_delta", "signature": block["signature"]}
            yield self._event("content_block_delta", delta=delta)
        else:
            block["text"] = text
        yield self._event("content_block_stop")
        self.message["content"].append(block)

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "index": len(self.message["content"]), **fields}


def _input_of(arguments: str) -> dict[str, Any]:
    """Return the arguments of a call as an object.

    If max_tokens has cut them, they are read as far as they go, as Anthropic's clients do in a
    stream. If they cannot be read, the object holds their text.
    """
    try:
        value = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {RAW_ARGUMENTS: arguments}


def _stop(choice: dict[str, Any]) -> dict[str, Any]:
    reason, text = choice["finish_reason"], choice["stop_reason"]
    if reason == "stop" and isinstance(text, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": text}
    return {"stop_reason": _STOP_REASONS[reason], "stop_sequence": None}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Convert the usage; cached tokens are reported separately."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    details = usage["completion_tokens_details"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"thinking_tokens": details["reasoning_tokens"]},
    }
