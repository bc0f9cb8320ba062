"""How the served model writes reasoning and tool calls, and the parser that reads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ....engine.errors import ConfigurationError
from ...settings import Settings
from ...templates.response_template import ResponseTemplate
from ...text.tokenizer import Tokenizer
from ..answer_parser import AnswerParser, Tools
from ..call_shape import CallShape
from ..calls_or_answer import CallsOrAnswer
from ..message_parser import MessageParser
from ..reasoning import (
    ReasoningParser,
    ReasoningStyle,
    detect_reasoning,
    starts_inside,
    tags_of,
)
from ..unclosed_reasoning import UnclosedReasoning
from .harmony import ASSISTANT, CONTROL_TOKENS, FINAL, HarmonyParser
from .response_template import ResponseTemplateParser
from .tool_formats import CANONICAL_NAMES, TOOL_FORMATS, detect_tool_format

_END_TOKENS = 16
"""Tokens of the prompt's end that show whether it opened the reasoning."""


def prompt_end(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """Return the text of the prompt's last tokens, which shows whether it opened the reasoning."""
    return "".join(map(tokenizer.token_text, prompt[-_END_TOKENS:]))


class MessageFormat:
    """How the served model writes reasoning and tool calls. Made once, when the server starts."""

    def __init__(
        self,
        tool_format: str | None,
        reasoning: ReasoningStyle | None,
        response_template: ResponseTemplate | None = None,
    ) -> None:
        self.tool_format = tool_format
        """A key of TOOL_FORMATS, or None if the format of calls is not known."""
        self.reasoning: ReasoningStyle | None = reasoning
        self._response_template = response_template

    @classmethod
    def of(
        cls,
        settings: Settings,
        chat_template: str | None,
        response_template: ResponseTemplate | None = None,
    ) -> MessageFormat:
        """Choose the formats by the flags, or by the model's chat template if a flag is "auto". If
        that shows no format of calls, the tokenizer's own response template says how to read them.

        Raises ConfigurationError if the two formats exclude each other, or if there is no usable
        response template and the flag asks for it.
        """
        template = chat_template or ""
        flag = settings.tool_call_parser
        name = CANONICAL_NAMES.get(flag)
        if flag == "auto":
            name = detect_tool_format(template)
            if name is None and response_template is not None:
                name = "response_template"
        if name == "response_template":
            if response_template is None:
                raise ConfigurationError(
                    "tool_call_parser: the model's tokenizer has no response_template"
                )
            response_template.check()
        style = settings.reasoning_parser
        reasoning: ReasoningStyle | None
        if style == "auto":
            reasoning = detect_reasoning(template)
        elif style == "harmony":
            reasoning = "openai_gptoss"
        else:
            reasoning = None if style == "none" else style
        format = cls(name, reasoning, response_template)
        if format.is_harmony and not (
            format.tool_format in ("openai", None) and reasoning in ("openai_gptoss", None)
        ):
            raise ConfigurationError(
                f"harmony is one format of reasoning and calls: tool_call_parser {flag} and "
                f"reasoning_parser {reasoning} do not go together"
            )
        return format

    @property
    def is_harmony(self) -> bool:
        """Reasoning, calls or both are in harmony, which then reads the whole answer."""
        return self.tool_format == "openai" or self.reasoning == "openai_gptoss"

    @property
    def is_generic(self) -> bool:
        """The chat template knows nothing of tools, so the conversation tells the model about them
        and shows calls and their results as texts."""
        return self.tool_format == "generic"

    def shape(self, template: str) -> CallShape | None:
        """Return how the model writes calls, so that they can be forced; None if they cannot be."""
        if self.tool_format is None:
            return None
        return TOOL_FORMATS[self.tool_format].shape(template)

    def control_tokens(self, *, with_tools: bool) -> tuple[str, ...]:
        """Return the markup that a parser must see even if it is a control token, whose text is
        otherwise skipped."""
        if self.is_harmony:
            return CONTROL_TOKENS
        if self.tool_format == "response_template" and self._response_template is not None:
            return self._response_template.control_tokens
        tags: tuple[str, ...] = ()
        if self.reasoning is not None:
            opening, closing, others = tags_of(self.reasoning)
            tags = (opening, closing, *others)
        if not with_tools or self.tool_format is None:
            return tags
        return tags + TOOL_FORMATS[self.tool_format].parser.control_tokens

    def parser(
        self,
        offered: Tools,
        *,
        prompt_end: str,
        continued: str | None,
        show_reasoning: bool,
        parallel_calls: bool,
        call_openings: Collection[str] = (),
    ) -> MessageParser:
        """Make the parser of one choice.

        Calls are looked for only if tools are `offered`. See `starts_inside` for `prompt_end` and
        `continued`. If there are `call_openings`, the answer is either calls, which begin with one
        of them, or content.
        """
        reasoning = unclosed = None
        tools: AnswerParser | CallsOrAnswer | None = None
        if self.is_harmony:
            tools = HarmonyParser(
                offered,
                prompt_end=prompt_end if continued is None else ASSISTANT + FINAL,
                reasons=self.reasoning is not None,
            )
        elif self.tool_format == "response_template" and self._response_template is not None:
            tools = ResponseTemplateParser(
                offered, template=self._response_template, prompt_end=prompt_end
            )
        else:
            format = TOOL_FORMATS[self.tool_format].parser if self.tool_format else None
            if format is not None and offered:
                calls = format(offered)
                tools = CallsOrAnswer(calls, call_openings) if call_openings else calls
            if self.reasoning is not None:
                opened = starts_inside(self.reasoning, prompt_end, continued)
                # An answer that the prompt has begun is past its reasoning, unless that is still
                # open.
                if opened or continued is None:
                    reasoning = ReasoningParser(opened=opened, tags=tags_of(self.reasoning))
                    may_be_unclosed = format is not None and offered and not call_openings
                    if format is not None and may_be_unclosed and format.has_tags():
                        unclosed = UnclosedReasoning(format(offered, only_tagged=True))
        return MessageParser(
            tools,
            reasoning,
            unclosed=unclosed,
            show_reasoning=show_reasoning,
            max_calls=None if parallel_calls else 1,
        )
