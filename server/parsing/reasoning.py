"""Separates the model's reasoning, such as `<think>…</think>`, from the answer that follows it."""

from __future__ import annotations

from enum import Enum, auto
from typing import Literal, NamedTuple, cast

from .message_events import ContentText, Event, ReasoningText

OPEN, CLOSE = "<think>", "</think>"
MAX_HELD_SPACE = 64
"""Maximum characters of white space that are held back until it is known what follows them."""

ReasoningStyle = Literal[
    "qwen3",
    "deepseek_r1",
    "mistral",
    "seed_oss",
    "cohere_command3",
    "gemma4",
    "openai_gptoss",
]
"""How a model marks its reasoning. The first two differ if the prompt does not settle how the
answer begins: with qwen3, and all others, it begins with text or with the opening tag; with
deepseek_r1 it begins inside the reasoning, with or without the opening tag. openai_gptoss has
channels instead (harmony.py)."""


class ReasoningTags(NamedTuple):
    """The texts that begin and end reasoning."""

    opening: str
    closing: str
    control_tokens: tuple[str, ...] = ()
    """Control tokens in them, if they are not control tokens as a whole."""


THINK = ReasoningTags(OPEN, CLOSE)
_TAGS: dict[str, ReasoningTags] = {
    "mistral": ReasoningTags("[THINK]", "[/THINK]"),
    "seed_oss": ReasoningTags("<seed:think>", "</seed:think>"),
    "cohere_command3": ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>"),
    "gemma4": ReasoningTags("<|channel>thought", "<channel|>", ("<|channel>", "<channel|>")),
}


def tags_of(style: ReasoningStyle) -> ReasoningTags:
    """Return the tags of a style."""
    return _TAGS.get(style, THINK)


class _State(Enum):
    START = auto()
    OPENED = auto()  # newlines after the opening tag
    INSIDE = auto()
    AFTER = auto()  # newlines after the closing tag
    CONTENT = auto()


class ReasoningParser:
    """Turns text into events. Line breaks between tags, reasoning and answer are dropped.

    `opened` says that the text begins inside the reasoning.
    """

    def __init__(self, *, opened: bool, tags: ReasoningTags = THINK) -> None:
        self._opened = opened
        self._tags = tags
        self._state = _State.START
        self._held = ""

    def feed(self, text: str) -> list[Event]:
        """Append `text` and return the events that it makes certain."""
        # One piece of text may lead through several states.
        self._held += text
        events: list[Event] = []
        if self._state is _State.START:
            self._at_start()
        if self._state is _State.OPENED:
            self._skip_newlines(_State.INSIDE)
        if self._state is _State.INSIDE:
            events += self._inside()
        if self._state is _State.AFTER:
            self._skip_newlines(_State.CONTENT)
        if self._state is _State.CONTENT and self._held:
            events.append(ContentText(self._held))
            self._held = ""
        return events

    def finish(self) -> list[Event]:
        """Return the text that was held back, once no more text comes."""
        rest, self._held = self._held, ""
        if not rest:
            return []
        inside = self._state in (_State.OPENED, _State.INSIDE)
        inside |= self._state is _State.START and self._opened
        return [ReasoningText(rest) if inside else ContentText(rest)]

    @property
    def closed(self) -> bool:
        """The reasoning has ended, or the text has none."""
        return self._state in (_State.AFTER, _State.CONTENT)

    def _at_start(self) -> None:
        begun = self._held.lstrip()
        opening = self._tags.opening
        if begun.startswith(opening):
            self._state, self._held = _State.OPENED, begun[len(opening) :]
        elif not opening.startswith(begun):
            self._state = _State.OPENED if self._opened else _State.CONTENT

    def _skip_newlines(self, following: _State) -> None:
        self._held = self._held.lstrip("\r\n")
        if self._held:
            self._state = following

    def _inside(self) -> list[Event]:
        closing = self._tags.closing
        at = self._held.find(closing)
        if at >= 0:
            keep = before_space(self._held, at)
            reasoning = self._held[:keep]
            self._state, self._held = _State.AFTER, self._held[at + len(closing) :]
        else:
            keep = undecided_tail(self._held, (closing,))
            reasoning, self._held = self._held[:keep], self._held[keep:]
        return [ReasoningText(reasoning)] if reasoning else []


def before_space(text: str, end: int) -> int:
    """Return the offset at which the white space before `end` begins, at most MAX_HELD_SPACE
    characters before `end`."""
    start = max(0, end - MAX_HELD_SPACE)
    return start + len(text[start:end].rstrip())


def undecided_tail(text: str, tags: tuple[str, ...], start: int = 0) -> int:
    """Return the offset of the tail of `text` that may become one of `tags`, or the white space
    before one. A tag begins at `start` or later."""
    return before_space(text, tag_tail(text, tags, start))


def tag_tail(text: str, tags: tuple[str, ...], start: int = 0) -> int:
    """Return the offset of the tail of `text` that may become one of `tags`, or the end of the
    text. A tag begins at `start` or later."""
    end = len(text)
    longest = max(map(len, tags)) - 1
    for length in range(min(longest, end - start), 0, -1):
        tail = text[end - length :]
        if any(tag.startswith(tail) for tag in tags):
            return end - length
    return end


def detect_reasoning(template: str) -> ReasoningStyle | None:
    """Return the style that a chat template shows, or None if it shows no reasoning."""
    if "<|channel|>" in template:
        return "openai_gptoss"
    for style, tags in _TAGS.items():
        if (*tags.control_tokens, tags.opening)[0] in template:
            return cast(ReasoningStyle, style)
    if OPEN in template:
        return "qwen3"
    # Such a template only removes the reasoning from earlier turns; the model opens it by itself.
    return "deepseek_r1" if CLOSE in template else None


def starts_inside(style: ReasoningStyle, prompt_end: str, continued: str | None = None) -> bool:
    """Return whether an answer begins inside the reasoning.

    `prompt_end` is the text of the prompt's last tokens. `continued` is the beginning of the answer
    if the prompt contains it already.
    """
    opening, closing, _ = tags_of(style)
    if continued is not None:
        return continued.rfind(opening) > continued.rfind(closing)
    prompt_end = prompt_end.rstrip()
    if prompt_end.endswith(opening):
        return True
    return style == "deepseek_r1" and not prompt_end.endswith(closing)
