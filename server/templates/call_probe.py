"""Finds out how a chat template reads calls, tools' results and reasoning of earlier turns."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from .probe_renders import FORMS, ProbeRenders, text_of
from .template_traits import EmptyContent, Form, Placing

_EMPTY: tuple[EmptyContent, ...] = ("empty", "null", "missing")
_REASONING: tuple[Literal["reasoning_content", "thinking", "reasoning"], ...] = (
    "reasoning_content",
    "thinking",
    "reasoning",
)
# An object that Python's own notation was printed for.
_PRINTED_OBJECT = re.compile(r"'zqkey\w*'\s*:")
_NO_CALLS: dict[str, Any] = {
    "calls": False,
    "tool": "none",
    "calls_without_tools": False,
    "arguments": "object",
    "flat_calls": False,
    "short_call_ids": False,
    "empty_content": "empty",
    "parallel_calls": "none",
    "content_beside_calls": "none",
    "tool_name": False,
}
"""The traits of a template that writes no calls."""


class _Calls(NamedTuple):
    """How calls are written, in the order in which the ways are tried."""

    short_ids: bool = False
    flat: bool = False
    tool: Form = "text"
    empty: EmptyContent = "empty"
    arguments: Literal["object", "text"] = "object"


class CallProbe:
    """Asks the questions about turns with calls. `find_calls` comes before `find_reasoning`."""

    def __init__(self, probe: ProbeRenders) -> None:
        self._probe = probe
        self._way: _Calls | None = None
        self._refuses_all = False
        """The template knows calls, but refused each way of writing them."""

    def find_calls(self, user: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        """Return the traits about calls and tools' results."""
        # 1. Find a way in which a call and its result are written. If there is none, results may
        #    still be written as any other message is.
        way, with_result = self._find_way(user)
        self._way = way
        tool_form = "none" if with_result else self._probe.find_form("tool", [user, answer])
        if way is None and not self._refuses_all:
            return {**_NO_CALLS, "tool": tool_form}
        way = way or _Calls()
        # 2. See what else a turn with calls may have.
        result, other = ([self._result(n, way)] if with_result else [] for n in (1, 2))
        one = [user, self._turn(way, 1), *result]
        two = [self._turn(way, 2), *other]
        both = [user, self._turn(way, 1, 2), *result, *other]
        beside = [user, self._turn(way, 1, text="zqbeside"), *result]
        before = [user, self._probe.message("assistant", "zqbeside"), *one[1:]]
        nameless = [{key: value for key, value in each.items() if key != "name"} for each in one]
        return {
            "calls": True,
            "tool": self._tool_form(way, one) if with_result else tool_form,
            "calls_without_tools": not self._probe.text(one)
            or self._writes_calls(way, one, strict=False, tools=None),
            "arguments": way.arguments,
            "flat_calls": way.flat,
            "short_call_ids": way.short_ids,
            "empty_content": way.empty,
            "parallel_calls": self._placing(way, both, [*one, *two]),
            "content_beside_calls": self._placing(way, beside, before, "zqbeside"),
            "tool_name": self._probe.text(one, tools=self._probe.tools)
            != self._probe.text(nameless, tools=self._probe.tools),
        }

    def keeps(self, before: dict[str, Any], user: dict[str, Any], word: str) -> bool:
        """Return whether `word` of a message `before` the user's is written if a tool's result ends
        the conversation. It is taken for granted if the template refuses results."""
        way = self._way
        if way is None:
            return True
        messages = [before, user, self._turn(way, 1), self._result(1, way)]
        text = self._probe.text(messages, tools=self._probe.tools)
        return not text or word in text

    def find_reasoning(
        self, user: dict[str, Any], last: dict[str, Any], answer: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the traits about earlier reasoning. Many templates write it only after the last
        user message or only beside calls."""
        words: dict[str, str] = {name: f"zq{name.replace('_', '')}z" for name in _REASONING}
        places: list[list[dict[str, Any]]] = [
            [user, {**answer, **words}],
            [user, {**answer, **words}, last],
        ]
        if self._way is not None:
            result = self._result(1, self._way)
            places.append([user, self._turn(self._way, 1, **words), result])
        name = None
        for messages in places:
            text = self._probe.text(messages, add_generation_prompt=False, tools=self._probe.tools)
            name = next((name for name in _REASONING if words[name] in text), None)
            if name is not None:
                break
        accepted = True
        if name is not None and self._way is not None:
            beside = self._turn(self._way, 1, text="zqbeside")
            thought = {**beside, name: words[name]}
            accepted = bool(
                self._probe.text([user, thought, result], tools=self._probe.tools)
            ) or not bool(self._probe.text([user, beside, result], tools=self._probe.tools))
        return {"reasoning": name, "reasoning_beside_content": accepted}

    def _call(self, number: int, way: _Calls) -> dict[str, Any]:
        """Return call `number` of a probe; each has words of its own."""
        arguments: Any = {f"zqkey{number}": f"zqvalue{number}"}
        if way.arguments == "text":
            arguments = json.dumps(arguments)
        function = {"name": f"zqcall{number}", "arguments": arguments}
        call_id = f"zqid0000{number}" if way.short_ids else f"call_zqid00000000000000000{number}"
        call = {"id": call_id, "type": "function", "function": function}
        return {**call, **function} if way.flat else call

    def _turn(self, way: _Calls, *numbers: int, text: str = "", **fields: Any) -> dict[str, Any]:
        """Return an assistant's turn with these calls and a text."""
        message: dict[str, Any] = {"role": "assistant", **fields}
        message["tool_calls"] = [self._call(number, way) for number in numbers]
        if text:
            message |= self._probe.message("assistant", text)
        elif way.empty != "missing":
            empty = [] if self._probe.forms["assistant"] == "parts" else ""
            message["content"] = empty if way.empty == "empty" else None
        return message

    def _result(self, number: int, way: _Calls) -> dict[str, Any]:
        """Return the tool's message that answers call `number`."""
        message = self._probe.message("tool", f"zqresult{number}")
        if way.tool == "parts":
            message["content"] = [{"type": "text", "text": message["content"]}]
        return {
            **message,
            "name": f"zqcall{number}",
            "tool_call_id": self._call(number, way)["id"],
        }

    def _writes_calls(
        self,
        way: _Calls,
        messages: Sequence[dict[str, Any]],
        words: Sequence[str] = (),
        *,
        strict: bool = True,
        **settings: Any,
    ) -> bool:
        """Return whether the calls in `messages`, the results and `words` are all written. Objects
        that are printed in Python's notation do not count, if `strict`."""
        expected = list(words)
        for message in messages:
            for call in message.get("tool_calls", ()):
                arguments = call["function"]["arguments"]
                expected.append(call["function"]["name"])
                if way.arguments == "object":
                    expected += [word for pair in arguments.items() for word in pair]
                else:
                    expected.append(arguments)
            if message["role"] == "tool":
                expected.append(text_of(message))
        text = self._probe.text(messages, **{"tools": self._probe.tools, **settings})
        if strict and _PRINTED_OBJECT.search(text):
            return False
        return self._probe.shows(expected, text)

    def _ways(self) -> Iterator[_Calls]:
        for values in itertools.product(
            (False, True), (False, True), FORMS, _EMPTY, ("object", "text")
        ):
            yield _Calls(*values)  # type: ignore[arg-type]

    def _find_way(self, user: dict[str, Any]) -> tuple[_Calls | None, bool]:
        """Return the first way in which a call is written, and whether its result is, too."""
        if "tool_calls" not in self._probe.template:
            return None, False
        for strict, with_result in ((True, True), (True, False), (False, True)):
            for way in self._ways():
                if way.tool == "parts" and not with_result:
                    continue
                result = [self._result(1, way)] if with_result else []
                messages = [user, self._turn(way, 1), *result]
                if self._writes_calls(way, messages, strict=strict):
                    return way, with_result
        way = _Calls()
        self._refuses_all = not self._probe.text([user, self._turn(way, 1), self._result(1, way)])
        return None, False

    def _tool_form(self, way: _Calls, one: list[dict[str, Any]]) -> Form:
        if way.tool == "parts":
            return "parts"
        parts = self._result(1, way._replace(tool="parts"))
        parts["content"].append({"type": "text", "text": "zqrest"})
        return "either" if self._writes_calls(way, [*one[:2], parts], ["zqrest"]) else "text"

    def _placing(
        self,
        way: _Calls,
        together: list[dict[str, Any]],
        apart: list[dict[str, Any]],
        *words: str,
    ) -> Placing:
        if self._writes_calls(way, together, words, strict=False):
            return "together"
        if self._writes_calls(way, apart, words, strict=False):
            return "apart"
        # What the template refuses either way is left to its own error message.
        return "none" if self._probe.text(together, tools=self._probe.tools) else "together"
