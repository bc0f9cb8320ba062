"""The grammar of a chat's answer: calls, a structured text, or either.

`tool_choice` required, or a function by name, makes the model call. A structure that the body asks
for (structured.py) beside tools leaves it the choice. The grammar writes calls in the model's own
format (call_shape.py), with arguments that follow the schema of the tool. Reasoning may come
first:

    start: reasoning? (calls | answer)
    calls: first call (separator call)* last
    call: call_0 | call_1 | …                          one rule for each tool
    call_0: before "name" between <schema> after
    answer: <structure>
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ...engine.errors import InvalidRequestError
from ...engine.grammar.compile import with_json_options
from ...engine.request import GrammarSpec
from ..parsing.call_shape import NUMBER, CallShape, call_rules
from ..parsing.formats.harmony import ANALYSIS, ASSISTANT, END, FINAL
from ..parsing.formats.message_format import MessageFormat, prompt_end
from ..parsing.reasoning import CLOSE, OPEN, starts_inside, tags_of
from ..text.tokenizer import Tokenizer
from .protocol import ChatBody
from .structured import MAX_GRAMMAR_BYTES, Constraint
from .tool_choice import allows_many_calls, callable_tools, forces_call, names_one_tool


class _Reasoning(NamedTuple):
    """The reasoning that may come before the calls or the answer."""

    rule: str = ""
    """Nothing, `reasoning`, or `(opening reasoning)?`."""
    opening: str = OPEN
    closing: str = CLOSE
    after: str = r"/\n{0,2}/"
    """Lark for the text between the reasoning and what follows."""


def chat_grammar(
    body: ChatBody,
    answer: Constraint | None,
    prompt: list[int],
    tokenizer: Tokenizer,
    message_format: MessageFormat,
) -> Constraint | None:
    """Return the grammar of a chat's answer, or None if the model may write what it likes.

    `answer` is the structure that the body asks for. If the model may call tools as well, it writes
    either calls or the structure; if it must call, there is nothing to be structured. `prompt`
    shows whether the reasoning has begun. Raises InvalidRequestError.
    """
    # 1. Choose the tools that may be called, and how many calls there may be.
    tools = callable_tools(body)
    if forces_call(body):
        answer = None
    elif answer is None:
        return None
    param = "tool_choice" if answer is None else answer.param
    many = allows_many_calls(body) and not names_one_tool(body)
    shape = _shape_of_calls(body, param, tokenizer, message_format) if tools else None
    # 2. Determine the reasoning that may come before the calls or the answer.
    end = prompt_end(tokenizer, prompt)
    special_ids = tokenizer.special_ids
    literal = _literal_writer(special_ids)
    before_answer = ""
    if message_format.is_harmony:
        many = False  # a call ends the answer
        shape, reasoning = _in_harmony(body, end, shape, literal)
        before_answer = "" if body.continue_final_message else FINAL
    else:
        reasoning = _reasoning(body, end, message_format, special_ids)
    if answer is not None and shape is None and not reasoning.rule and not before_answer:
        return answer
    # 3. Write the grammar. Harmony itself says what is a call.
    lazy = reasoning.closing not in special_ids
    writer = _Writer(shape, tools, many, reasoning, literal, lazy_thoughts=lazy)
    text = writer.grammar(None if answer is None else before_answer)
    openings = () if message_format.is_harmony else writer.openings()
    return _constraint(text, answer, openings, "tools" if tools else param, param)


def _constraint(
    text: str, answer: Constraint | None, call_openings: tuple[str, ...], at_fault: str, param: str
) -> Constraint:
    """Return the constraint of a grammar that allows `answer`, if there is one. `at_fault` is the
    parameter that makes the rest of it, and `param` the one that asks for a grammar."""
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidRequestError(
            f"the tools make a grammar of more than {MAX_GRAMMAR_BYTES} bytes, which is too long "
            + ("to force a call" if answer is None else f"to be combined with {param}"),
            param,
        )
    if answer is None:
        return Constraint(GrammarSpec("grammar", text), param)
    spec = GrammarSpec.nested(text, answer.spec)
    return Constraint(spec, at_fault, part=answer, call_openings=call_openings)


def _shape_of_calls(
    body: ChatBody, param: str, tokenizer: Tokenizer, message_format: MessageFormat
) -> CallShape:
    """Return how the model writes calls. Raises InvalidRequestError if no grammar can tell."""
    template = body.chat_template or tokenizer.templates.choose(tools=True) or ""
    shape = message_format.shape(template)
    # A list of calls cannot be told from an answer that is a list by its beginning.
    is_list = shape is not None and shape.first + shape.before in ("[", "[\n")
    if shape is None or (is_list and param != "tool_choice"):
        reason = (
            f"calls cannot be forced in this model's format ({message_format.tool_format}); "
            "tool_choice must be none or auto"
            if param == "tool_choice"
            else f"{param}: cannot be combined with tools in this model's format of calls"
        )
        raise InvalidRequestError(reason, param)
    return shape


def _reasoning(
    body: ChatBody, end: str, message_format: MessageFormat, special_ids: dict[str, int]
) -> _Reasoning:
    """Return the reasoning that may follow a prompt that ends with `end`."""
    style = message_format.reasoning
    if style is None:
        return _Reasoning()
    continued = body.messages[-1].content if body.continue_final_message else None
    opening, closing, _ = tags_of(style)
    if starts_inside(style, end, continued):
        # A model that is inside from the start may still write the tag, which the thoughts do not
        # match if it is a control token.
        may_open = (
            opening in special_ids and continued is None and not end.rstrip().endswith(opening)
        )
        rule = "opening? reasoning" if may_open else "reasoning"
        return _Reasoning(rule, opening, closing)
    rule = "" if continued is not None else "(opening reasoning)?"
    return _Reasoning(rule, opening, closing)


def _in_harmony(
    body: ChatBody, end: str, shape: CallShape | None, literal: Callable[[str], str]
) -> tuple[CallShape | None, _Reasoning]:
    """Return the shape of calls and the reasoning in harmony.

    The answer is a message of analysis, which may be missing, and a message to a function or the
    final one. If it continues the final message, it ends that message before it calls.
    """
    if body.continue_final_message:
        return shape and shape._replace(first=END + ASSISTANT), _Reasoning()
    rule = "reasoning" if end.endswith(ANALYSIS) else "(opening reasoning)?"
    return shape, _Reasoning(rule, ANALYSIS, END, literal(ASSISTANT))


class _Writer:
    """Writes the grammar in llguidance's dialect of Lark; see the module's docstring.

    `literal` writes a text (see `_literal_writer`). `lazy_thoughts` says that the thoughts end at
    the first closing tag. Their pattern never matches a control token, so only a closing tag that
    is text needs such a match.
    """

    def __init__(
        self,
        shape: CallShape | None,
        tools: list[dict[str, Any]],
        many: bool,
        reasoning: _Reasoning,
        literal: Callable[[str], str],
        *,
        lazy_thoughts: bool,
    ) -> None:
        self._shape = shape
        self._tools = tools
        self._many = many
        self._reasoning = reasoning
        self._literal = literal
        self._lazy = "[lazy]" if lazy_thoughts else ""
        self._has_answer = False

    def openings(self) -> tuple[str, ...]:
        """Return the texts with which calls begin, one for each tool."""
        shape = self._shape
        if shape is None:
            return ()
        before = shape.first + shape.before
        texts = (before + tool["name"] + shape.between for tool in self._tools)
        return tuple(text.partition(NUMBER)[0] for text in texts)

    def grammar(self, before_answer: str | None) -> str:
        """Return the whole grammar. `before_answer` is the text before the rule `answer`, which is
        left undefined; None if there is no answer besides calls."""
        self._has_answer = before_answer is not None
        ways = [] if before_answer is None else [f"{self._literal(before_answer)} answer"]
        rules = self._call_rules()
        if rules:
            ways.insert(0, "calls")
        rules.insert(0, f"start: {self._reasoning.rule} ({' | '.join(ways)})")
        return "\n".join(rules + self._reasoning_rules()) + "\n"

    def _call_rules(self) -> list[str]:
        shape = self._shape
        if shape is None:
            return []
        first, separator, last = map(self._literal, (shape.first, shape.separator, shape.last))
        calls = f"call ({separator} call)*" if self._many else "call"
        rules = [
            f"calls: {first} {calls} {last}",
            "call: " + " | ".join(f"call_{number}" for number in range(len(self._tools))),
        ]
        for number, tool in enumerate(self._tools):
            if self._is_bare(shape):
                rules.append(f"call_{number}: %json {_bare_call(shape, tool)}")
                continue
            rules += call_rules(shape, number, tool, self._literal)
        return rules

    def _is_bare(self, shape: CallShape) -> bool:
        """Return whether a call begins as a structured answer may. Then it must be told by the same
        kind of rule, since the lexer could not choose between `{` and a longer text."""
        return self._has_answer and (shape.first + shape.before).startswith("{")

    def _reasoning_rules(self) -> list[str]:
        reasoning = self._reasoning
        if not reasoning.rule:
            return []
        return [
            f"opening: {self._literal(reasoning.opening)}",
            f"reasoning: thoughts {reasoning.after}",
            rf"thoughts{self._lazy}: /(.|\n)*/ {self._literal(reasoning.closing)}",
        ]


def _bare_call(shape: CallShape, tool: dict[str, Any]) -> str:
    """Return the JSON schema of a call that is written as a JSON object with the members of
    `shape`."""
    members = json.loads(f"{shape.before}{tool['name']}{shape.between}null{shape.after}")
    parameters = {**tool["parameters"], "type": "object"}
    # References within the schema start at its root.
    defined = {key: parameters.pop(key) for key in ("$defs", "definitions") if key in parameters}
    properties = {
        key: parameters if value is None else {"const": value} for key, value in members.items()
    }
    schema = {
        **defined,
        "type": "object",
        "properties": properties,
        "required": list(members),
        "additionalProperties": False,
    }
    return json.dumps(with_json_options(schema))


def _literal_writer(special_ids: dict[str, int]) -> Callable[[str], str]:
    """Return a function that writes a text in Lark, its control tokens as tokens, by their ids."""
    spellings = "|".join(map(re.escape, sorted(special_ids, key=len, reverse=True)))
    pattern = re.compile(f"({spellings})" if spellings else r"\Z")

    def literal(text: str) -> str:
        return " ".join(
            f"<[{special_ids[piece]}]>" if piece in special_ids else json.dumps(piece)
            for piece in pattern.split(text)
            if piece
        )

    return literal
