"""Renders conversations with words to look for, and tells which of them a chat template wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from .template_traits import Form

Render = Callable[..., str]
"""Renders messages, with the template's variables as keywords."""

MAX_RENDERS = 160
"""Maximum renders of one template. What is not known by then counts as not written."""
FORMS: tuple[Literal["text", "parts"], ...] = ("text", "parts")
"""Forms of a content, in the order in which they are tried."""
# A list of parts that a template prints whole, instead of reading the parts' text.
_PRINTED_PART = re.compile(r"""['"]text['"]\s*:\s*['"]zq""")


class ProbeRenders:
    """Renders conversations of one template, and remembers the forms that worked."""

    def __init__(self, render: Render, errors: tuple[type[Exception], ...], template: str) -> None:
        """`render` raises one of `errors` on messages that the template refuses."""
        self._render = render
        self._errors = errors
        self._left = MAX_RENDERS
        self.template = template
        self.forms: dict[str, Form] = {}
        """The forms of the roles' contents, as far as they are known."""
        self.tools: list[dict[str, Any]] | None = None
        """A tool that the template writes, if there is one."""
        self.prefix: list[dict[str, Any]] = []
        """Messages without which the template refuses every conversation. They stand before those
        that begin with another role."""

    def text(self, messages: Sequence[dict[str, Any]], **settings: Any) -> str:
        """Return the rendered text, or "" if the template refuses the messages. A space stands for
        a rendered text that is empty."""
        if self._left <= 0:
            return ""
        self._left -= 1
        if self.prefix and messages[0]["role"] != self.prefix[0]["role"]:
            messages = [*self.prefix, *messages]
        try:
            return self._render(messages, **{"add_generation_prompt": True, **settings}) or " "
        except self._errors:
            return ""

    def writes(
        self, words: Sequence[str], messages: Sequence[dict[str, Any]], **settings: Any
    ) -> bool:
        """Return whether all `words` are in the rendered text as the messages have them."""
        return self.shows(words, self.text(messages, **settings))

    def shows(self, words: Sequence[str], text: str) -> bool:
        """Return whether all `words` are in a rendered text, and no list of parts is."""
        return all(word in text for word in words) and not _PRINTED_PART.search(text)

    def message(self, role: str, text: str, form: Form | None = None) -> dict[str, Any]:
        """Return a message in a form that works for its role. Two parts tell whether all are
        read."""
        if (form or self.forms.get(role)) != "parts":
            return {"role": role, "content": text}
        parts = [{"type": "text", "text": text}]
        if form is not None:
            parts.append({"type": "text", "text": "zqrest"})
        return {"role": role, "content": parts}

    def find_form(self, role: str, before: Sequence[Any] = (), after: Sequence[Any] = ()) -> Form:
        """Return the form in which the content of `role` is written between other messages."""
        others = [text_of(message) for message in (*before, *after)]
        works: list[Form] = []
        failure: Form = "refused"
        for form in FORMS:
            words = [*others, "zqprobe", *(["zqrest"] if form == "parts" else [])]
            text = self.text([*before, self.message(role, "zqprobe", form), *after])
            if self.shows(words, text):
                works.append(form)
            elif text and form == "text":
                failure = "none"
        return "either" if len(works) == 2 else works[0] if works else failure


def text_of(message: dict[str, Any]) -> str:
    """Return the text of a message's content, or of its first part."""
    content = message["content"]
    return str(content if isinstance(content, str) else content[0]["text"])
