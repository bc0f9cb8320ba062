"""The forms in which a chat's answer returns calls: of functions, in the old form, or of custom
tools."""

from __future__ import annotations

from typing import Any

from ..requests.protocol import ChatBody
from ..requests.tool_choice import custom_input, custom_tools

Fields = dict[str, Any]


class CallForm:
    """The ordinary form, which leaves everything as it is. One object serves one choice."""

    def message(self, message: Fields) -> Fields:
        """Return a whole message."""
        return message

    def deltas(self, deltas: list[Fields], *, ended: bool) -> list[Fields]:
        """Return the next deltas of a stream; `ended` says that they are the last."""
        return deltas

    def finish_reason(self, reason: str | None) -> str | None:
        """Return the finish reason."""
        return reason


class OldForm(CallForm):
    """The form for requests with `functions`: the only call is the message's `function_call`."""

    def message(self, message: Fields) -> Fields:
        calls = message.pop("tool_calls", None)
        return {**message, "function_call": calls[0]["function"]} if calls else message

    def deltas(self, deltas: list[Fields], *, ended: bool) -> list[Fields]:
        return [
            {"function_call": delta["tool_calls"][0]["function"]}
            if "tool_calls" in delta
            else delta
            for delta in deltas
        ]

    def finish_reason(self, reason: str | None) -> str | None:
        return "function_call" if reason == "tool_calls" else reason


class CustomForm(CallForm):
    """The form for requests with custom tools, whose calls have a text as input instead of
    arguments. In a stream the input comes in one piece, once the call is complete."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._index = 0
        self._arguments: str | None = None
        """Arguments of the custom call that has begun, as far as they came."""

    def message(self, message: Fields) -> Fields:
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] in self._names:
                function = call.pop("function")
                call["type"] = "custom"
                call["custom"] = {
                    "name": function["name"],
                    "input": custom_input(function["arguments"]),
                }
        return message

    def deltas(self, deltas: list[Fields], *, ended: bool) -> list[Fields]:
        written: list[Fields] = []
        for delta in deltas:
            [call] = delta.get("tool_calls") or [{}]
            function = call.get("function", {})
            is_start = "id" in call
            if not call or is_start:
                written += self._finished()
            if is_start and function["name"] in self._names:
                self._index, self._arguments = call["index"], ""
                custom = {"name": function["name"], "input": ""}
                first = {"index": call["index"], "id": call["id"], "type": "custom"}
                written.append({"tool_calls": [{**first, "custom": custom}]})
            elif call and not is_start and self._arguments is not None:
                self._arguments += function["arguments"]
            else:
                written.append(delta)
        return written + (self._finished() if ended else [])

    def _finished(self) -> list[Fields]:
        """Return the input of the custom call that has begun, if there is one."""
        if self._arguments is None:
            return []
        custom = {"input": custom_input(self._arguments)}
        self._arguments = None
        return [{"tool_calls": [{"index": self._index, "custom": custom}]}]


def call_form(body: ChatBody) -> CallForm:
    """Make the form of one choice."""
    if body.functions is not None:
        return OldForm()
    names = custom_tools(body)
    return CustomForm(names) if names else CallForm()
