"""Finds out what a chat template reads, by rendering conversations with words to look for.

A template says nowhere what it reads: it may iterate over `content` as a list of parts, drop or
refuse system messages, concatenate the arguments of a call or write them as JSON. Reading its
source would be guessing. So each trait is found by rendering a short conversation with marker words
and looking for them in the result. If a form of a message loses a word, the next form is tried. A
template is rendered some 40 times (probe_renders.py bounds it).
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Collection
from typing import Any, Literal

from .call_probe import CallProbe
from .probe_renders import ProbeRenders, Render, text_of
from .template_traits import TemplateTraits

_SWITCHES: dict[str, tuple[Any, Any]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning_effort": ("high", "low"),
    "thinking_budget": (0, 1024),
}
"""Variables by which templates turn reasoning on and off, with two values that should differ."""
_DOCUMENT_FIELDS = ("title", "text", "doc_id", "content", "contents", "snippet", "source", "url")
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
    probe = ProbeRenders(render, errors, template)
    return _TemplateProbe(probe, variables, control_tokens).run()


class _TemplateProbe:
    """Asks all questions about one template."""

    def __init__(
        self,
        probe: ProbeRenders,
        variables: Collection[str],
        control_tokens: re.Pattern[str] | None,
    ) -> None:
        self._probe = probe
        self._calls = CallProbe(probe)
        self._variables = variables
        self._control_tokens = control_tokens

    def run(self) -> TemplateTraits:
        """Return all traits. The order matters: later questions use the forms found before."""
        forms = self._probe.forms
        # 1. The user's and the assistant's text. Some templates want a system message before them.
        forms["user"] = self._probe.find_form("user")
        if forms["user"] == "refused":
            self._probe.prefix = [{"role": "system", "content": "zqprefix"}]
            forms["user"] = self._probe.find_form("user")
        if forms["user"] == "refused":
            return self._trusted()
        first, last = self._probe.message("user", "zquser"), self._probe.message("user", "zqlast")
        forms["assistant"] = self._probe.find_form("assistant", [first], [last])
        answer, other = (self._probe.message("assistant", text) for text in ("zqanswer", "zqother"))
        opened = self._probe.text([first])
        closed = self._probe.text([first], add_generation_prompt=False)
        # 2. Tools, calls and reasoning.
        tools, needs_description = self._find_tools(last)
        calls = self._calls.find_calls(first, answer)
        return TemplateTraits(
            probed=True,
            user=forms["user"],
            assistant=forms["assistant"],
            **self._find_instructions(first, answer, last),
            repeated_user=self._probe.writes(["zquser", "zqlast"], [first, last]),
            repeated_assistant=self._probe.writes(
                ["zqanswer", "zqother", "zqlast"], [first, answer, other, last]
            ),
            history=forms["assistant"] != "none"
            or not self._probe.text([first, answer, last])
            or self._probe.writes(["zquser", "zqlast"], [first, answer, last]),
            user_name="zqname" in self._probe.text([{**first, "name": "zqname"}]),
            **calls,
            **self._calls.find_reasoning(first, last, answer),
            tools=tools,
            needs_description=needs_description,
            documents=self._find_documents(first),
            settings=tuple(sorted(set(self._variables) - {"tools", "documents"})),
            thinking=tuple(name for name in _SWITCHES if self._switches(first, name)),
            generation_prompt=_addition(closed, opened),
            turn_end=self._find_turn_end(first, answer),
        )

    def _trusted(self) -> TemplateTraits:
        """Return the traits of a template that cannot be tried out: it reads what OpenAI writes."""
        knows = self._variables
        return TemplateTraits(
            probed=False,
            user="text",
            assistant="text",
            system="text",
            tool="text",
            developer="developer" in self._probe.template,
            system_beside_tools=True,
            several_systems=True,
            lone_system=True,
            lasting_system=True,
            late_system=True,
            repeated_user=True,
            repeated_assistant=True,
            history=True,
            user_name=True,
            calls=True,
            calls_without_tools=True,
            arguments="object",
            flat_calls=False,
            short_call_ids=False,
            empty_content="empty",
            parallel_calls="together",
            content_beside_calls="together",
            tool_name=False,
            reasoning="reasoning_content",
            reasoning_beside_content=True,
            tools="nested" if "tools" in knows else "none",
            needs_description=False,
            documents=("*",) if "documents" in knows else (),
            settings=tuple(sorted(set(knows) - {"tools", "documents"})),
            thinking=(),
            generation_prompt="",
            turn_end="",
        )

    def _find_instructions(
        self, first: dict[str, Any], answer: dict[str, Any], last: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the traits about messages of the system and the developer."""
        probe = self._probe
        probe.forms["system"] = probe.find_form("system", after=[last])
        system, second = (probe.message("system", text) for text in ("zqsystem", "zqsecond"))
        developer = {**probe.message("system", "zqdeveloper"), "role": "developer"}
        words = ["zqsystem", "zqsecond", "zqlast"]
        knows_developer = "developer" in probe.template and probe.writes(
            ["zqdeveloper", "zqlast"], [developer, last]
        )
        several = probe.writes(words, [system, second, last])
        if knows_developer:
            several &= probe.writes(["zqsystem", "zqdeveloper"], [system, developer, last])
        return {
            "system": probe.forms["system"],
            "developer": knows_developer,
            "system_beside_tools": probe.tools is None
            or probe.writes(["zqsystem"], [system, last], tools=probe.tools),
            "several_systems": several,
            "lone_system": probe.writes(["zqsystem"], [system]),
            "lasting_system": probe.writes(
                ["zqsystem"], [system, first, answer], add_generation_prompt=False
            )
            and self._calls.keeps(system, first, "zqsystem"),
            "late_system": probe.writes(words, [system, first, answer, second, last]),
        }

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
                if self._probe.writes([*words, text_of(user)], [user], tools=[tool]):
                    self._probe.tools = [tool]
                    bare = {key: value for key, value in _TOOL.items() if key != "description"}
                    undescribed = {**tool, "function": bare} | (bare if name == "flat" else {})
                    undescribed.pop("description", None)
                    ok = self._probe.writes(["zqtool"], [user], tools=[undescribed])
                    return name, not ok
        tool = shapes[0][1]
        # What the template refuses is left to its own error message.
        return ("none" if self._probe.text([user], tools=[tool]) else "nested"), False

    def _find_documents(self, user: dict[str, Any]) -> tuple[str, ...]:
        if "documents" not in self._variables:
            return ()
        document = {name: f"zqdoc{name.replace('_', '')}z" for name in _DOCUMENT_FIELDS}
        text = self._probe.text([user], documents=[{**document, "zqfield": "zqdocanyz"}])
        if "zqdocanyz" in text or not text:  # what it refuses is left to its own error message
            return ("*",)
        return tuple(name for name in _DOCUMENT_FIELDS if document[name] in text)

    def _switches(self, user: dict[str, Any], name: str) -> bool:
        """Return whether the template's variable `name` changes the prompt."""
        if name not in self._variables:
            return False
        one, other = (self._probe.text([user], **{name: value}) for value in _SWITCHES[name])
        return one != other

    def _find_turn_end(self, user: dict[str, Any], answer: dict[str, Any]) -> str:
        """Return the control token that follows the assistant's text."""
        text = self._probe.text([user, answer], add_generation_prompt=False)
        at = text.rfind("zqanswer")
        if at < 0 or self._control_tokens is None:
            return ""
        match = self._control_tokens.match(text[at + len("zqanswer") :].lstrip())
        return match.group() if match else ""


def _addition(closed: str, opened: str) -> str:
    """Return how `opened` goes on where it parts from `closed`. A control token that both begin is
    a part of it."""
    at = len(os.path.commonprefix([closed, opened]))
    while at < len(closed) and opened[:at].endswith(("<", "|", "[")):
        at -= 1
    return opened[at:]
