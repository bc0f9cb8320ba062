"""`tool_choice` required, or a function by name: a grammar in which the model can only call.

The grammar writes calls in the model's own format (call_shape.py), with arguments that follow the
schema of the tool. Reasoning may come before the calls:

    start: reasoning? first call (separator call)* last
    call: call_0 | call_1 | …                          one rule for each tool
    call_0: before "name" between <schema> after
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from ...engine.errors import InvalidRequestError
from ...engine.request import GrammarSpec
from ..parsing.call_shape import CallShape, call_rules
from ..parsing.formats.harmony import ANALYSIS, ASSISTANT, END
from ..parsing.formats.message_format import MessageFormat, prompt_end
from ..parsing.reasoning import CLOSE, OPEN, starts_inside, tags_of
from ..text.tokenizer import Tokenizer
from .field_types import NamedTool
from .protocol import ChatBody
from .structured import MAX_GRAMMAR_BYTES, Constraint
from .tool_choice import forces_call, offered_tools


class _Reasoning(NamedTuple):
    """The reasoning that may come before the calls."""

    rule: str = ""
    """Nothing, `reasoning`, or `(opening reasoning)?`."""
    opening: str = OPEN
    closing: str = CLOSE
    after: str = r"/\n{0,2}/"
    """Lark for the text between the reasoning and the calls."""


def forced_call(
    body: ChatBody, prompt: list[int], tokenizer: Tokenizer, message_format: MessageFormat
) -> Constraint | None:
    """Return the grammar that makes the model call, or None if `tool_choice` does not force a call.

    `prompt` shows whether the reasoning has begun. Raises InvalidRequestError.
    """
    # 1. Choose the tools that may be called, and how many calls there may be.
    choice = body.tool_choice
    if not forces_call(body):
        return None
    template = body.chat_template or tokenizer.chat_template or ""
    shape = message_format.shape(template)
    if shape is None:
        raise InvalidRequestError(
            f"calls cannot be forced in this model's format ({message_format.tool_format}); "
            "tool_choice must be none or auto",
            "tool_choice",
        )
    tools = [tool["function"] for tool in offered_tools(body)]
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool["name"] == choice.name]
    many = choice == "required" and body.parallel_tool_calls is not False
    # 2. Determine the reasoning that may come before the calls.
    end = prompt_end(tokenizer, prompt)
    if message_format.is_harmony:
        many = False  # a call ends the answer
        shape, reasoning = _in_harmony(body, end, shape, tokenizer.special_ids)
    else:
        reasoning = _reasoning(body, end, message_format)
    # 3. Write the grammar.
    text = _grammar(shape, tools, many, reasoning, tokenizer.special_ids)
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidRequestError(
            f"the tools make a grammar of more than {MAX_GRAMMAR_BYTES} bytes, which is too long "
            "to force a call",
            "tool_choice",
        )
    return Constraint(GrammarSpec("grammar", text), "tool_choice")


def _reasoning(body: ChatBody, end: str, message_format: MessageFormat) -> _Reasoning:
    """Return the reasoning that may follow a prompt that ends with `end`."""
    style = message_format.reasoning
    if style is None:
        return _Reasoning()
    continued = body.messages[-1].content if body.continue_final_message else None
    opening, closing, _ = tags_of(style)
    if starts_inside(style, end, continued):
        return _Reasoning("reasoning", opening, closing)
    rule = "" if continued is not None else "(opening reasoning)?"
    return _Reasoning(rule, opening, closing)


def _in_harmony(
    body: ChatBody, end: str, shape: CallShape, special_ids: dict[str, int]
) -> tuple[CallShape, _Reasoning]:
    """Return the shape and the reasoning of a forced call in harmony.

    The answer is a message of analysis, which may be missing, and a message to a function. If it
    continues the final message, it ends that message first.
    """
    if body.continue_final_message:
        return shape._replace(first=END + ASSISTANT), _Reasoning()
    rule = "reasoning" if end.endswith(ANALYSIS) else "(opening reasoning)?"
    return shape, _Reasoning(rule, ANALYSIS, END, _literal(ASSISTANT, special_ids))


def _grammar(
    shape: CallShape,
    tools: list[dict[str, Any]],
    many: bool,
    reasoning: _Reasoning,
    special_ids: dict[str, int],
) -> str:
    """Return the grammar in llguidance's dialect of Lark; see the module's docstring."""

    def literal(text: str) -> str:
        return _literal(text, special_ids)

    calls = f"call ({literal(shape.separator)} call)*" if many else "call"
    rules = [
        f"start: {reasoning.rule} {literal(shape.first)} {calls} {literal(shape.last)}",
        "call: " + " | ".join(f"call_{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        rules += call_rules(shape, number, tool, literal)
    if reasoning.rule:
        # The pattern of the thoughts never matches a control token, so only a closing tag that is
        # text needs the lazy match, which ends the thoughts at the first one.
        lazy = "" if reasoning.closing in special_ids else "[lazy]"
        rules += [
            f"opening: {literal(reasoning.opening)}",
            f"reasoning: thoughts {reasoning.after}",
            rf"thoughts{lazy}: /(.|\n)*/ {literal(reasoning.closing)}",
        ]
    return "\n".join(rules) + "\n"


def _literal(text: str, special_ids: dict[str, int]) -> str:
    """Return Lark for `text`, in which control tokens are written as tokens, by their ids."""
    spellings = "|".join(map(re.escape, sorted(special_ids, key=len, reverse=True)))
    pieces = re.split(f"({spellings})", text) if spellings else [text]
    return " ".join(
        f"<[{special_ids[piece]}]>" if piece in special_ids else json.dumps(piece)
        for piece in pieces
        if piece
    )
