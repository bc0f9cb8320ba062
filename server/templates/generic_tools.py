"""Tools for models whose chat template knows nothing of them.

The conversation is rewritten into one that any template can render: a system text tells the model
about the tools and how to call them; earlier calls become text of the assistant, as the model would
write them; results become text of the user. The parser that reads the model's answer is Hermes's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .call_arguments import parse_arguments

_INTRODUCTION = """\
You can call functions. Each of them is described by a line of JSON, with a JSON schema of its \
arguments:

{tools}

To call a function, answer with a JSON object between tags, with arguments that follow the schema:

<tool_call>
{{"name": "the name of the function", "arguments": {{"the name of an argument": "its value"}}}}
</tool_call>

You may make several calls, each between its own tags. Then wait: the next message tells you the \
results. If you need no function, just answer."""


def with_tools_as_text(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    *,
    has_system: bool,
) -> list[dict[str, Any]]:
    """Return the conversation without tools, calls or results, but with texts that say the same.

    Calls in `messages` have their arguments as JSON texts. `has_system` says whether the template
    renders system messages; if it does not, the tools are told at the beginning of the first
    message of the user. Raises InvalidRequestError if the arguments of a call are no JSON object.
    """
    # 1. Write calls and results as text. Results that follow each other, and a message of the user
    #    after them, make one message, since many templates want user and assistant in turn.
    names = {
        call.get("id"): call["function"]["name"]
        for message in messages
        for call in message.get("tool_calls") or ()
    }
    texts: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        text = dict(message)
        is_result = text["role"] == "tool"
        if is_result:
            result = _result(names.get(text.get("tool_call_id")), str(text.get("content") or ""))
            text = {"role": "user", "content": result}
        elif calls := text.pop("tool_calls", None):
            parts = [text.get("content") or "", *map(_call, calls)]
            text["content"] = "\n".join(filter(None, parts))
        if after_result and text["role"] == "user":
            texts[-1]["content"] += "\n\n" + str(text.get("content") or "")
        else:
            texts.append(text)
        after_result = text["role"] == "user" and (is_result or after_result)
    # 2. Tell the model about the tools.
    return _introduced(texts, tools, has_system=has_system) if tools else texts


def _introduced(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], *, has_system: bool
) -> list[dict[str, Any]]:
    """Return the conversation with the description of the tools."""
    lines = (json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools="\n".join(lines))
    roles = ("system", "developer") if has_system else ("user",)
    places = [at for at, message in enumerate(messages) if message["role"] in roles]
    if not places or (has_system and places[0] > 0):
        return [{"role": roles[0], "content": text}, *messages]
    first = messages[places[0]]
    content = str(first.get("content") or "")
    joined = [content, text] if has_system else [text, content]
    first = {**first, "content": "\n\n".join(filter(None, joined))}
    return [*messages[: places[0]], first, *messages[places[0] + 1 :]]


def _call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    arguments = parse_arguments(function["arguments"])
    text = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{text}\n</tool_call>"


def _result(name: str | None, content: str) -> str:
    of = "" if name is None else f" of {name}"
    return f"Result{of}:\n<tool_response>\n{content}\n</tool_response>"
