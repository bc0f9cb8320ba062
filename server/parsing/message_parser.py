"""Turns a model's answer into a message, in the formats that the served model writes.

    text ─▶ ReasoningParser ─▶ parser of calls, fed with the content ─▶ hidden events dropped

Harmony has a single parser for reasoning and calls, in the place of the second.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ...engine.errors import ConfigurationError
from ..settings import Settings
from ..text.tokenizer import Tokenizer
from .answer_parser import AnswerParser
from .harmony import ANALYSIS, ASSISTANT, CONTROL_TOKENS, FINAL, HarmonyParser
from .message_events import ContentText, Event, ReasoningText, ToolCallStart, joined
from .reasoning import CLOSE, OPEN, ReasoningParser, ReasoningStyle, detect_reasoning, starts_inside
from .reasoning_tokens import ReasoningCounter
from .tool_formats import TOOL_PARSERS, detect_tool_parser

_END_TOKENS = 16
"""Tokens of the prompt's end that show whether it opened the reasoning."""


class MessageParser:
    """Turns one choice's text into events, which add up to the same message however the text is
    cut.

    `max_calls` drops the calls after that many; without `show_reasoning`, reasoning is dropped.
    """

    def __init__(
        self,
        tools: AnswerParser | None = None,
        reasoning: ReasoningParser | None = None,
        *,
        show_reasoning: bool = True,
        max_calls: int | None = None,
    ) -> None:
        self._tools = tools
        self._reasoning = reasoning
        self._show_reasoning = show_reasoning
        self._max_calls = max_calls
        self._has_calls = False

    def feed(self, text: str) -> list[Event]:
        """Append `text` and return the events that it makes certain."""
        events: list[Event] = [ContentText(text)] if text else []
        if self._reasoning is not None:
            events = self._reasoning.feed(text)
        return self._shown(self._read_calls(events))

    def finish(self) -> list[Event]:
        """Return the remaining events, once no more text comes."""
        events = self._reasoning.finish() if self._reasoning is not None else []
        events = self._read_calls(events)
        if self._tools is not None:
            events += self._tools.finish()
        return self._shown(events)

    def finish_reason(self, reason: str | None) -> str | None:
        """Return the finish reason of the answer: that of the engine, except that an ordinary stop
        after calls is "tool_calls"."""
        return "tool_calls" if reason == "stop" and self._has_calls else reason

    def _read_calls(self, events: Iterable[Event]) -> list[Event]:
        """Pass content through the parser of calls, if there is one."""
        if self._tools is None:
            return list(events)
        read: list[Event] = []
        for event in events:
            read += self._tools.feed(event.text) if isinstance(event, ContentText) else [event]
        return read

    def _shown(self, events: Iterable[Event]) -> list[Event]:
        """Drop the events that the client has not asked for, and merge the rest."""
        shown: list[Event] = []
        for event in events:
            if isinstance(event, ContentText):
                shown.append(event)
            elif isinstance(event, ReasoningText):
                shown += [event] if self._show_reasoning else []
            elif self._max_calls is None or event.call < self._max_calls:
                self._has_calls |= isinstance(event, ToolCallStart)
                shown.append(event)
        return joined(shown)


def prompt_end(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """Return the text of the prompt's last tokens, which shows whether it opened the reasoning."""
    return "".join(map(tokenizer.token_text, prompt[-_END_TOKENS:]))


class MessageFormat:
    """How the served model writes reasoning and tool calls. Made once, when the server starts."""

    def __init__(self, tool_format: str | None, reasoning: ReasoningStyle | None) -> None:
        self.tool_format = tool_format
        """A key of TOOL_PARSERS, or None if the format of calls is not known."""
        self.reasoning: ReasoningStyle | None = reasoning

    @classmethod
    def of(cls, settings: Settings, chat_template: str | None) -> MessageFormat:
        """Choose the formats by the flags, or by the model's chat template if a flag is "auto".
        Raises ConfigurationError if the two formats exclude each other."""
        template = chat_template or ""
        name: str | None = settings.tool_call_parser
        if name == "auto":
            name = detect_tool_parser(template)
        elif name == "harmony":
            name = "openai"
        style = settings.reasoning_parser
        reasoning: ReasoningStyle | None
        if style == "auto":
            reasoning = detect_reasoning(template)
        elif style == "harmony":
            reasoning = "openai_gptoss"
        else:
            reasoning = None if style == "none" else style
        format = cls(None if name == "none" else name, reasoning)
        if format.is_harmony and not (
            format.tool_format in ("openai", None) and reasoning in ("openai_gptoss", None)
        ):
            raise ConfigurationError(
                f"harmony is one format of reasoning and calls: tool_call_parser {name} and "
                f"reasoning_parser {reasoning} do not go together"
            )
        return format

    @property
    def is_harmony(self) -> bool:
        """Reasoning, calls or both are in harmony, which then reads the whole answer."""
        return self.tool_format == "openai" or self.reasoning == "openai_gptoss"

    def control_tokens(self, *, with_tools: bool) -> tuple[str, ...]:
        """Return the markup that a parser must see even if it is a control token, whose text is
        otherwise skipped."""
        if self.is_harmony:
            return CONTROL_TOKENS
        tags = () if self.reasoning is None else (OPEN, CLOSE)
        if not with_tools or self.tool_format is None:
            return tags
        return tags + TOOL_PARSERS[self.tool_format].control_tokens

    def reasoning_counter(
        self, tokenizer: Tokenizer, *, prompt_end: str, continued: str | None
    ) -> ReasoningCounter | None:
        """Make the counter of one choice's reasoning, or return None if it has none."""
        if self.reasoning is None:
            return None
        opened = starts_inside(self.reasoning, prompt_end, continued)
        if self.is_harmony:
            opened = continued is None and prompt_end.endswith(ANALYSIS)
        elif continued is not None and not opened:
            return None
        return ReasoningCounter(self.reasoning, tokenizer.token_bytes, opened=opened)

    def parser(
        self,
        tool_names: Collection[str],
        *,
        prompt_end: str,
        continued: str | None,
        show_reasoning: bool,
        parallel_calls: bool,
    ) -> MessageParser:
        """Make the parser of one choice.

        Calls are looked for only if there are `tool_names`. See `starts_inside` for `prompt_end`
        and `continued`.
        """
        reasoning = None
        tools: AnswerParser | None = None
        if self.is_harmony:
            tools = HarmonyParser(
                tool_names,
                prompt_end=prompt_end if continued is None else ASSISTANT + FINAL,
                reasons=self.reasoning is not None,
            )
        elif self.reasoning is not None:
            opened = starts_inside(self.reasoning, prompt_end, continued)
            # An answer that the prompt has begun is past its reasoning, unless that is still open.
            if opened or continued is None:
                reasoning = ReasoningParser(opened=opened)
        if tools is None and tool_names and self.tool_format is not None:
            tools = TOOL_PARSERS[self.tool_format](tool_names)
        return MessageParser(
            tools,
            reasoning,
            show_reasoning=show_reasoning,
            max_calls=None if parallel_calls else 1,
        )
