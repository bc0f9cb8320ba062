"""A model's answer as a message: its reasoning, its content, its tool calls."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ...engine.errors import ConfigurationError
from ..settings import Settings
from ..text.tokenizer import Tokenizer
from .harmony import ASSISTANT, CONTROL_TOKENS, FINAL, HarmonyParser
from .message_events import ContentText, Event, ReasoningText, ToolCallStart, joined
from .reasoning import CLOSE, OPEN, ReasoningParser, ReasoningStyle, detect_reasoning, starts_inside
from .tool_formats import TOOL_PARSERS, detect_tool_parser
from .tool_parsers import AnswerParser

_END_TOKENS = 16


class MessageParser:
    """One choice's text to events. What `feed` and `finish` return adds up to the same message,
    however the text is cut."""

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
        events: list[Event] = [ContentText(text)] if text else []
        if self._reasoning is not None:
            events = self._reasoning.feed(text)
        return self._shown(self._read_calls(events))

    def finish(self) -> list[Event]:
        events = self._reasoning.finish() if self._reasoning is not None else []
        events = self._read_calls(events)
        if self._tools is not None:
            events += self._tools.finish()
        return self._shown(events)

    def finish_reason(self, reason: str | None) -> str | None:
        """The engine's, but for an end after calls."""
        return "tool_calls" if reason == "stop" and self._has_calls else reason

    def _read_calls(self, events: Iterable[Event]) -> list[Event]:
        if self._tools is None:
            return list(events)
        read: list[Event] = []
        for event in events:
            read += self._tools.feed(event.text) if isinstance(event, ContentText) else [event]
        return read

    def _shown(self, events: Iterable[Event]) -> list[Event]:
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
    """As much text of the prompt's end as tells whether its template opened the reasoning."""
    return "".join(map(tokenizer.token_text, prompt[-_END_TOKENS:]))


class MessageFormat:
    """How the served model writes reasoning and tool calls; made once."""

    def __init__(self, tool_format: str | None, reasoning: ReasoningStyle | None) -> None:
        self.tool_format = tool_format
        """A name of TOOL_PARSERS."""
        self.reasoning: ReasoningStyle | None = reasoning

    @classmethod
    def of(cls, settings: Settings, chat_template: str | None) -> MessageFormat:
        """By the flags, and where those say auto, by the model's chat template. Raises
        ConfigurationError."""
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
        return self.tool_format == "openai" or self.reasoning == "openai_gptoss"

    def control_tokens(self, *, with_tools: bool) -> tuple[str, ...]:
        """What a parser must see although the vocabulary may call it a control token."""
        if self.is_harmony:
            return CONTROL_TOKENS
        tags = () if self.reasoning is None else (OPEN, CLOSE)
        if not with_tools or self.tool_format is None:
            return tags
        return tags + TOOL_PARSERS[self.tool_format].control_tokens

    def parser(
        self,
        tool_names: Collection[str],
        *,
        prompt_end: str,
        continued: str | None,
        show_reasoning: bool,
        parallel_calls: bool,
    ) -> MessageParser:
        """For one choice. No call is looked for where `tool_names` is empty; see `starts_inside`
        for `prompt_end` and `continued`."""
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
            # What continues a finished beginning of an answer is past its reasoning.
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
