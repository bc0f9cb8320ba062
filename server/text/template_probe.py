"""Finds out what a chat template reads, by rendering conversations with words to look for.

A template says nowhere what it reads: it may iterate over `content` as a list of parts, drop or
refuse system messages, concatenate the arguments of a call or write them as JSON. Reading its
source would be guessing. So each trait is found by rendering a short conversation with marker words
and looking for them in the result. If a form of a message loses a word, the next form is tried. A
template is rendered some 40 times, and at most MAX_RENDERS times.
"""

from __future__ import annotations

import itertools
import json
import os.path
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from .template_traits import EmptyContent, Form, Placing, TemplateTraits

Render = Callable[..., str]
"""Renders messages, with the template's variables as keywords."""

MAX_RENDERS = 160
"""Maximum renders of one template. What is not known by then counts as not written."""
_FORMS: tuple[Literal["text", "parts"], ...] = ("text", "parts")
_EMPTY: tuple[EmptyContent, ...] = ("empty", "null", "missing")
_SWITCHES = ("enable_thinking", "thinking")
_DOCUMENT_FIELDS = ("title", "text", "doc_id", "content", "contents", "snippet", "source", "url")
_REASONING: tuple[Literal["reasoning_content", "thinking", "reasoning"], ...] = (
    "reasoning_content",
    "thinking",
    "reasoning",
)
_TOOL = {
    "name": "zqtool",
    "description": "zqdescription",
    "parameters": {
        "type": "object",
        "properties": {"zqkey": {"type": "string", "description": "zqmeaning"}},
        "required": ["zqkey"],
    },
}
_TOOL_WORDS = ("zqtool", "zqdescription", "zqkey")
# A list of parts that a template prints whole, instead of reading the parts' text.
_PRINTED_PART = re.compile(r"""['"]text['"]\s*:\s*['"]zq""")
# An object that Python's own notation was printed for.
_PRINTED_OBJECT = re.compile(r"'zqkey\w*'\s*:")


class _Calls(NamedTuple):
    """How calls are written, in the order in which the ways are tried."""

    short_ids: bool = False
    flat: bool = False
    tool: Form = "text"
    empty: EmptyContent = "empty"
    arguments: Literal["object", "text"] = "object"


def probe_template(
    render: Render,
    errors: tuple[type[Exception], ...],
    template: str,
    variables: Collection[str],
    control_tokens: re.Pattern[str] | None,
) -> TemplateTraits:
    """Return what `template` reads.

    `render` raises one of `errors` on messages that the template refuses. `variables` are those
    that it reads; `control_tokens` matches the spelling of a control token.
    """
    return _Probe(render, errors, template, variables, control_tokens).run()


class _Probe:
    """Renders conversations of one template, and remembers the forms that worked."""

    def __init__(
        self,
        render: Render,
        errors: tuple[type[Exception], ...],
        template: str,
        variables: Collection[str],
        control_tokens: re.Pattern[str] | None,
    ) -> None:
        self._render = render
        self._errors = errors
        self._template = template
        self._variables = variables
        self._control_tokens = control_tokens
        self._left = MAX_RENDERS
        self._forms: dict[str, Form] = {}
        self._tools: list[dict[str, Any]] | None = None
        self._way: _Calls | None = None

    # -- rendering ---------------------------------------------------------------------------

    def _try(self, messages: Sequence[dict[str, Any]], **settings: Any) -> str:
        """Return the rendered text, or "" if the template refuses the messages."""
        if self._left <= 0:
            return ""
        self._left -= 1
        try:
            return self._render(messages, **{"add_generation_prompt": True, **settings})
        except self._errors:
            return ""

    def _writes(
        self, words: Sequence[str], messages: Sequence[dict[str, Any]], **settings: Any
    ) -> bool:
        """Return whether all `words` are in the rendered text as the messages have them."""
        text = self._try(messages, **settings)
        return all(word in text for word in words) and not _PRINTED_PART.search(text)

    def _message(self, role: str, text: str, form: Form | None = None) -> dict[str, Any]:
        """Return a message in a form that works for its role. Two parts tell whether all are
        read."""
        if (form or self._forms.get(role)) != "parts":
            return {"role": role, "content": text}
        parts = [{"type": "text", "text": text}]
        if form is not None:
            parts.append({"type": "text", "text": "zqrest"})
        return {"role": role, "content": parts}

    def _find_form(self, role: str, before: Sequence[Any] = (), after: Sequence[Any] = ()) -> Form:
        """Return the form in which the content of `role` is written between other messages."""
        others = [_text_of(message) for message in (*before, *after)]
        works: list[Form] = []
        for form in _FORMS:
            words = [*others, "zqprobe", *(["zqrest"] if form == "parts" else [])]
            message = self._message(role, "zqprobe", form)
            if self._writes(words, [*before, message, *after]):
                works.append(form)
        return "either" if len(works) == 2 else works[0] if works else "none"

    # -- the questions -----------------------------------------------------------------------

    def run(self) -> TemplateTraits:
        """Return all traits. The order matters: later questions use the forms found before."""
        forms = self._forms
        # 1. The user's and the assistant's text.
        forms["user"] = self._find_form("user")
        first, last = self._message("user", "zquser"), self._message("user", "zqlast")
        forms["assistant"] = self._find_form("assistant", [first], [last])
        answer, other = (self._message("assistant", text) for text in ("zqanswer", "zqother"))
        opened = self._try([first])
        closed = self._try([first], add_generation_prompt=False)
        # 2. Instructions.
        forms["system"] = self._find_form("system", after=[last])
        system, second = (self._message("system", text) for text in ("zqsystem", "zqsecond"))
        developer = {**self._message("system", "zqdeveloper"), "role": "developer"}
        knows_developer = "developer" in self._template and self._writes(
            ["zqdeveloper", "zqlast"], [developer, last]
        )
        several = self._writes(["zqsystem", "zqsecond", "zqlast"], [system, second, last])
        if knows_developer:
            several = several and self._writes(
                ["zqsystem", "zqdeveloper"], [system, developer, last]
            )
        # 3. Tools, calls and reasoning.
        tools, needs_description = self._find_tools(last)
        calls = self._find_calls(first, answer)
        with_tools = {"tools": self._tools} if self._tools else {}
        return TemplateTraits(
            user=forms["user"],
            assistant=forms["assistant"],
            system=forms["system"],
            developer=knows_developer,
            system_beside_tools=not self._tools
            or self._writes(["zqsystem"], [system, last], **with_tools),
            several_systems=several,
            lone_system=self._writes(["zqsystem"], [system]),
            late_system=self._writes(
                ["zqsystem", "zqsecond", "zqlast"], [system, first, answer, second, last]
            ),
            repeated_user=self._writes(["zquser", "zqlast"], [first, last]),
            repeated_assistant=self._writes(
                ["zqanswer", "zqother", "zqlast"], [first, answer, other, last]
            ),
            history=forms["assistant"] != "none"
            or self._writes(["zquser", "zqlast"], [first, answer, last]),
            user_name="zqname" in self._try([{**first, "name": "zqname"}]),
            **calls,
            **self._find_reasoning(first, last, answer),
            tools=tools,
            needs_description=needs_description,
            documents=self._find_documents(first),
            settings=tuple(sorted(set(self._variables) - {"tools", "documents"})),
            thinking=tuple(name for name in _SWITCHES if self._switches(first, name)),
            generation_prompt=_addition(closed, opened),
            turn_end=self._find_turn_end(first, answer),
        )

    def _find_tools(self, user: dict[str, Any]) -> tuple[Literal["nested", "flat", "none"], bool]:
        """Return how tools are read, and whether each needs a description."""
        if "tools" not in self._variables:
            return "none", False
        shapes: tuple[tuple[Literal["nested", "flat"], dict[str, Any]], ...] = (
            ("nested", {"type": "function", "function": _TOOL}),
            ("flat", {"type": "function", "function": _TOOL, **_TOOL}),
        )
        for words in (_TOOL_WORDS, _TOOL_WORDS[:1]):
            for name, tool in shapes:
                if self._writes([*words, _text_of(user)], [user], tools=[tool]):
                    self._tools = [tool]
                    bare = {key: value for key, value in _TOOL.items() if key != "description"}
                    undescribed = {**tool, "function": bare} | (bare if name == "flat" else {})
                    undescribed.pop("description", None)
                    ok = self._writes(["zqtool"], [user], tools=[undescribed])
                    return name, not ok
        return "none", False

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
        message = {"role": "assistant", **fields}
        message["tool_calls"] = [self._call(number, way) for number in numbers]
        if text:
            message |= self._message("assistant", text)
        elif way.empty != "missing":
            empty = [] if self._forms["assistant"] == "parts" else ""
            message["content"] = empty if way.empty == "empty" else None
        return message

    def _result(self, number: int, way: _Calls) -> dict[str, Any]:
        """Return the tool's message that answers call `number`."""
        message = self._message("tool", f"zqresult{number}")
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
                expected.append(_text_of(message))
        text = self._try(messages, **{"tools": self._tools, **settings})
        if strict and _PRINTED_OBJECT.search(text):
            return False
        return all(word in text for word in expected) and not _PRINTED_PART.search(text)

    def _ways(self) -> Iterator[_Calls]:
        for values in itertools.product(
            (False, True), (False, True), _FORMS, _EMPTY, ("object", "text")
        ):
            yield _Calls(*values)  # type: ignore[arg-type]

    def _find_way(self, user: dict[str, Any]) -> tuple[_Calls | None, bool]:
        """Return the first way in which a call is written, and whether its result is, too."""
        if "tool_calls" not in self._template:
            return None, False
        for strict, with_result in ((True, True), (True, False), (False, True)):
            for way in self._ways():
                result = [self._result(1, way)] if with_result else []
                messages = [user, self._turn(way, 1), *result]
                if self._writes_calls(way, messages, strict=strict):
                    return way, with_result
                if not with_result and way.tool == "parts":
                    break
        return None, False

    def _find_calls(self, user: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        """Return the traits about calls and tools' results."""
        # 1. Find a way in which a call and its result are written. If there is none, results may
        #    still be written as any other message is.
        way, with_result = self._find_way(user)
        self._way = way
        tool_form = "none" if with_result else self._find_form("tool", [user, answer])
        if way is None:
            return {**_NO_CALLS, "tool": tool_form}
        # 2. See what else a turn with calls may have.
        result, other = ([self._result(n, way)] if with_result else [] for n in (1, 2))
        one = [user, self._turn(way, 1), *result]
        two = [self._turn(way, 2), *other]
        both = [user, self._turn(way, 1, 2), *result, *other]
        beside = [user, self._turn(way, 1, text="zqbeside"), *result]
        before = [user, self._message("assistant", "zqbeside"), *one[1:]]
        nameless = [{key: value for key, value in each.items() if key != "name"} for each in one]
        return {
            "calls": True,
            "tool": self._tool_form(way, one) if with_result else tool_form,
            "calls_without_tools": self._writes_calls(way, one, strict=False, tools=None),
            "arguments": way.arguments,
            "flat_calls": way.flat,
            "short_call_ids": way.short_ids,
            "empty_content": way.empty,
            "parallel_calls": self._placing(way, both, [*one, *two]),
            "content_beside_calls": self._placing(way, beside, before, "zqbeside"),
            "tool_name": self._try(one, tools=self._tools)
            != self._try(nameless, tools=self._tools),
        }

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
        return "apart" if self._writes_calls(way, apart, words, strict=False) else "none"

    def _find_reasoning(
        self, user: dict[str, Any], last: dict[str, Any], answer: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the traits about earlier reasoning. Many templates write it only after the last
        user message or only beside calls."""
        words = {name: f"zq{name.replace('_', '')}z" for name in _REASONING}
        places = [[user, {**answer, **words}], [user, {**answer, **words}, last]]
        if self._way is not None:
            result = self._result(1, self._way)
            places.append([user, self._turn(self._way, 1, **words), result])
        name = None
        for messages in places:
            text = self._try(messages, add_generation_prompt=False, tools=self._tools)
            name = next((name for name in _REASONING if words[name] in text), None)
            if name is not None:
                break
        accepted = True
        if name is not None and self._way is not None:
            beside = self._turn(self._way, 1, text="zqbeside")
            thought = {**beside, name: words[name]}
            accepted = bool(self._try([user, thought, result], tools=self._tools)) or not bool(
                self._try([user, beside, result], tools=self._tools)
            )
        return {"reasoning": name, "reasoning_beside_content": accepted}

    def _find_documents(self, user: dict[str, Any]) -> tuple[str, ...]:
        if "documents" not in self._variables:
            return ()
        document = {name: f"zqdoc{name.replace('_', '')}z" for name in _DOCUMENT_FIELDS}
        text = self._try([user], documents=[{**document, "zqfield": "zqdocanyz"}])
        if "zqdocanyz" in text:
            return ("*",)
        return tuple(name for name in _DOCUMENT_FIELDS if document[name] in text)

    def _switches(self, user: dict[str, Any], name: str) -> bool:
        """Return whether the template's variable `name` changes how the assistant's turn begins."""
        if name not in self._variables:
            return False
        return self._try([user], **{name: True}) != self._try([user], **{name: False})

    def _find_turn_end(self, user: dict[str, Any], answer: dict[str, Any]) -> str:
        """Return the control token that follows the assistant's text."""
        text = self._try([user, answer], add_generation_prompt=False)
        at = text.rfind("zqanswer")
        if at < 0 or self._control_tokens is None:
            return ""
        match = self._control_tokens.match(text[at + len("zqanswer") :].lstrip())
        return match.group() if match else ""


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


def _addition(closed: str, opened: str) -> str:
    """Return how `opened` goes on where it parts from `closed`. A control token that both begin with
    is a part of it."""
    at = len(os.path.commonprefix([closed, opened]))
    while at < len(closed) and opened[:at].endswith(("<", "|", "[")):
        at -= 1
    return opened[at:]


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return str(content if isinstance(content, str) else content[0]["text"])
