"""`tool_choice` required, or a function by name: a grammar in which the model can only call.

The grammar writes calls in the model's own format (tool_formats.py), with arguments that follow the
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
from ...engine.grammar.compile import with_json_options
from ...engine.request import GrammarSpec
from ..parsing.harmony import ANALYSIS, ASSISTANT, CHANNEL, CONSTRAIN, END, FUNCTIONS, MESSAGE
from ..parsing.message_parser import MessageFormat, prompt_end
from ..parsing.reasoning import CLOSE, OPEN, starts_inside
from ..text.tokenizer import Tokenizer
from .field_types import NamedTool
from .protocol import ChatBody
from .structured import MAX_GRAMMAR_BYTES, Constraint
from .tool_choice import forces_call, offered_tools


class _Shape(NamedTuple):
    """How calls are written: each is `before`, name, `between`, arguments, `after`."""

    first: str
    """Text before all calls."""
    before: str
    between: str
    after: str
    separator: str
    """Text between two calls."""
    last: str
    """Text after all calls."""


_NAMED = '{"name": "', '", "arguments": ', "}"


def _shape(parser: str, template: str) -> _Shape | None:
    """Return how the model's chat template writes earlier calls, or None if no shape is known.

    `parser` is a key of TOOL_PARSERS.
    """
    match parser:
        case "hermes":
            before, between, after = _NAMED
            return _Shape("", "<tool_call>\n" + before, between, after + "\n</tool_call>", "\n", "")
        case "llama3_json":
            return _Shape("", '{"name": "', '", "parameters": ', "}", "; ", "")
        case "mistral" if "[ARGS]" in template:
            return _Shape("", "[TOOL_CALLS]", "[ARGS]", "", "", "")
        case "mistral":
            return _Shape("[TOOL_CALLS][", *_NAMED, ", ", "]")
        case "deepseek_v3":
            begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
            call, sep, call_end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
            if "```json" in template:
                return _Shape(
                    begin, f"{call}function{sep}", "\n```json\n", f"\n```{call_end}", "\n", end
                )
            return _Shape(begin, call, sep, call_end, "", end)
        case "openai":
            before, between = f"{CHANNEL}commentary to={FUNCTIONS}", f" {CONSTRAIN}json{MESSAGE}"
            return _Shape("", before, between, "", "", "")
    return None


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
    template = body.chat_template or tokenizer.templates.choose(tools=True) or ""
    shape = _shape(message_format.tool_format or "", template)
    if shape is None:
        raise InvalidRequestError(
            "calls cannot be forced in this model's format; tool_choice must be none or auto",
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
    if starts_inside(style, end, continued):
        return _Reasoning("reasoning")
    return _Reasoning("" if continued is not None else "(opening reasoning)?")


def _in_harmony(
    body: ChatBody, end: str, shape: _Shape, special_ids: dict[str, int]
) -> tuple[_Shape, _Reasoning]:
    """Return the shape and the reasoning of a forced call in harmony.

    The answer is a message of analysis, which may be missing, and a message to a function. If it
    continues the final message, it ends that message first.
    """
    if body.continue_final_message:
        return shape._replace(first=END + ASSISTANT), _Reasoning()
    rule = "reasoning" if end.endswith(ANALYSIS) else "(opening reasoning)?"
    return shape, _Reasoning(rule, ANALYSIS, END, _literal(ASSISTANT, special_ids))


def _grammar(
    shape: _Shape,
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
        schema = json.dumps(with_json_options({**tool["parameters"], "type": "object"}))
        before = literal(shape.before + tool["name"] + shape.between)
        rules.append(f"call_{number}: {before} %json {schema} {literal(shape.after)}")
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
