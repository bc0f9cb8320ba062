"""The answer of POST /v1/responses: the response and its events, written from a chat's choices."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from ..api.chat import Chat
from ..api.translation import BlockWriter, Event, Piece
from ..errors import error_body
from .custom_input import CustomInput
from .responses_body import ResponseBody
from .responses_tools import Called, Tools, client_call
from .sealed import seal

_EVENTS_OF = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function": "response.function_call_arguments",
    "custom": "response.custom_tool_call_input",
}
"""The names of the events of a block, by its kind. A call has the kind of its tool."""


class ResponseWriter(BlockWriter):
    """Builds `response` while the chat runs, and the events that report its progress.

    Its output grows by whole items, so GET may return it at any time.
    """

    def __init__(
        self, response_id: str, model: str, body: ResponseBody, tools: Tools, *, store: bool
    ) -> None:
        super().__init__()
        self.response = _new_response(response_id, model, body, store=store)
        self.ended = False
        self._tools = tools
        # Ids of items name the worker too, so that a reference to one finds it.
        self._suffix = response_id[len("resp_") + 32 :]
        self._show_logprobs = body.shows_logprobs
        self._seals_reasoning = body.seals_reasoning
        self._sequence_number = 0
        self._kind = ""
        self._first = Piece("text", "")
        self._custom = CustomInput()
        self._item: dict[str, Any] = {}
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    async def events(self, chat: Chat) -> AsyncGenerator[Event, None]:
        """Run `chat` and yield all events, from the first to the last. Raises QuireError."""
        params = chat.job.requests[0].sampling_params
        self.response.update(
            status="in_progress", temperature=params.temperature, top_p=params.top_p
        )
        finish_reason = None
        begun = False
        async with aclosing(chat.choices()) as choices:
            async for choice in choices:
                if not begun:
                    begun = True
                    yield self._event("response.created", response=self.response)
                    yield self._event("response.in_progress", response=self.response)
                for event in self.feed(choice):
                    yield event
                finish_reason = choice["finish_reason"] or finish_reason
        self.response["usage"] = _usage(chat.generation.usage())
        status = "incomplete" if finish_reason == "length" else "completed"
        for event in self._finish(status):
            yield event

    def _finish(self, status: str) -> Iterator[Event]:
        response = self.response
        if self._open is None and not response["output"]:  # clients expect a message
            self._open = ("text", 0)
            yield from self.open_block(Piece("text", ""))
        yield from self.close(status)
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        yield self._end(status)

    def fail(self, error: Exception, request_id: str) -> Iterator[Event]:
        """Yield the last events of a response that failed with `error`."""
        body = error_body(error, request_id)["error"]
        message = f"{body['code']}: {body['message']}"
        self.response["error"] = {"code": "server_error", "message": message}
        yield from self.close("incomplete")
        yield self._end("failed")

    def cancel(self) -> None:
        """End the response as cancelled; this has no event."""
        self._end("cancelled")

    def _end(self, status: str) -> Event:
        self.response["status"] = status
        self.response["completed_at"] = int(time.time()) if status == "completed" else None
        self.ended = True
        return self._event(f"response.{status}", response=self.response)

    def open_block(self, first: Piece) -> Iterator[Event]:
        self._texts, self._logprobs, self._first = [], [], first
        called = self._tools.find(first.name)
        self._kind = called.kind if first.kind == "call" else first.kind
        if self._kind not in _EVENTS_OF:
            return  # what the client runs is shown when it is complete
        self._item = _new_item(first, called, self._suffix)
        if self._kind == "reasoning" and self._seals_reasoning:
            self._item["encrypted_content"] = ""
        self._custom = CustomInput()
        yield self._event("response.output_item.added", item=self._item)
        if first.kind != "call":
            yield self._event("response.content_part.added", content=True, part=self._part())

    def extend_block(self, piece: Piece) -> Iterator[Event]:
        text = piece.text
        if self._kind == "custom":
            text = self._custom.feed(text)
        self._texts.append(text)
        if self._kind not in _EVENTS_OF or not (text or piece.logprobs):
            return
        fields: dict[str, Any] = {"delta": text}
        if piece.kind == "text":
            fields["logprobs"] = list(piece.logprobs)
            self._logprobs += piece.logprobs
        name = f"{_EVENTS_OF[self._kind]}.delta"
        yield self._event(name, content=piece.kind != "call", **fields)

    def close_block(self, status: str) -> Iterator[Event]:
        if self._kind in _EVENTS_OF:
            yield from self._close_streamed()
        else:
            yield from self._close_client_call()
        item = self._item
        item["status"] = status
        yield self._event("response.output_item.done", item=item)
        self.response["output"].append(item)

    def _close_streamed(self) -> Iterator[Event]:
        """Complete an item of which everything has been shown."""
        item, name = self._item, f"{_EVENTS_OF[self._kind]}.done"
        if self._kind == "custom":
            rest = self._custom.finish()
            if rest:
                self._texts.append(rest)
                yield self._event(f"{_EVENTS_OF['custom']}.delta", delta=rest)
            item["input"] = "".join(self._texts)
            yield self._event(name, input=item["input"])
        elif self._kind == "function":
            item["arguments"] = "".join(self._texts)
            yield self._event(name, arguments=item["arguments"], name=item["name"])
        else:
            part = self._part()
            fields = {"text": part["text"]}
            if self._kind == "text":
                fields["logprobs"] = self._logprobs
            yield self._event(name, content=True, **fields)
            yield self._event("response.content_part.done", content=True, part=part)
            item["content"] = [part]
            if "encrypted_content" in item:
                item["encrypted_content"] = seal(part["text"])

    def _close_client_call(self) -> Iterator[Event]:
        """Show a call that the client runs. If its arguments are broken, it is the call of a
        function, which no client runs by mistake."""
        first, arguments = self._first, "".join(self._texts)
        called = self._tools.find(first.name)
        call = client_call(called.kind, arguments)
        if call is None:
            self._kind = "function"
            self._item = _new_item(first, Called("function", first.name), self._suffix)
            yield self._event("response.output_item.added", item=self._item)
            yield from self._close_streamed()
            return
        number = uuid.uuid4().hex + self._suffix
        self._item = {"id": f"tc_{number}", "call_id": first.id, **call, "status": "in_progress"}
        yield self._event("response.output_item.added", item=self._item)

    def _part(self) -> dict[str, Any]:
        text = "".join(self._texts)
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        part = {"type": "output_text", "text": text, "annotations": []}
        return {**part, "logprobs": self._logprobs} if self._show_logprobs else part

    def _event(self, kind: str, *, content: bool = False, **fields: Any) -> Event:
        """Make an event with the next number and the indices of what it is about.

        That is the response if `fields` has one, and otherwise the open item, or its content if
        `content` is true.
        """
        event: Event = {"type": kind, "sequence_number": self._sequence_number}
        self._sequence_number += 1
        if "response" not in fields:
            event["output_index"] = len(self.response["output"])
        if content:
            event["content_index"] = 0
        if not fields.keys() & {"response", "item"}:
            event["item_id"] = self._item["id"]
        return {**event, **fields}


def _new_item(first: Piece, called: Called, suffix: str) -> dict[str, Any]:
    number = uuid.uuid4().hex + suffix
    match first.kind:
        case "text":
            item = {"id": f"msg_{number}", "type": "message", "role": "assistant", "content": []}
        case "reasoning":
            item = {"id": f"rs_{number}", "type": "reasoning", "summary": [], "content": []}
        case "call":
            if called.kind == "custom":
                item = {"id": f"ctc_{number}", "type": "custom_tool_call", "input": ""}
            else:
                item = {"id": f"fc_{number}", "type": "function_call", "arguments": ""}
            item |= {"call_id": first.id, "name": called.name}
            if called.namespace is not None:
                item["namespace"] = called.namespace
    return {**item, "status": "in_progress"}


def _new_response(
    response_id: str, model: str, body: ResponseBody, *, store: bool
) -> dict[str, Any]:
    reasoning, text = body.reasoning, body.text
    text_format = text.format if text is not None else None
    function = {"type": "function", "description": None, "parameters": None, "strict": None}
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "conversation": {"id": body.conversation} if body.conversation else None,
        "status": "queued",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": store,
        "temperature": body.temperature,
        "text": {"format": text_format or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": [
            {**function, **tool} if tool["type"] == "function" else tool
            for tool in body.tools or ()
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    details = usage["completion_tokens_details"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": details["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
    }
