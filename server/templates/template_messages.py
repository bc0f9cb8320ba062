"""Writes a conversation the way its chat template reads it, so that no text of it is lost.

Nothing here renders anything: `template_probe` has found out, once, what the template reads, and
each step below is a cheap conversion. What can be neither written nor moved is refused by name.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...engine.errors import InvalidRequestError
from .call_arguments import parse_arguments
from .template_traits import Form, TemplateTraits

SYSTEM_IN_USER = "system-in-user"
"""The text of a system message was put before that of a user message."""
SYSTEM_JOINED = "system-joined"
"""System messages were joined into one."""
TURNS_JOINED = "turns-joined"
"""Messages of one role in a row were joined into one."""
CALLS_APART = "calls-apart"
"""A turn with several calls, or with text and calls, was written as several turns."""
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_INSTRUCTIONS = ("system", "developer")

Message = dict[str, Any]


class Written(NamedTuple):
    """A conversation as a template reads it."""

    messages: list[Message]
    changes: tuple[str, ...]
    """What was moved: constants of this module."""
    dropped: tuple[str, ...]
    """Paths of the fields that the template does not read."""


def write_messages(
    messages: Sequence[Mapping[str, Any]], traits: TemplateTraits, *, with_tools: bool
) -> Written:
    """Return `messages` as a template with these traits reads them.

    Contents are strings or lists of text parts, and arguments of calls are JSON texts. `with_tools`
    says that the prompt offers tools. Raises InvalidRequestError, naming the field, for what the
    template does not write.
    """
    _refuse_unwritten(messages, traits, with_tools)
    dropped = _unread(messages, traits)
    changes: dict[str, None] = {}
    # 1. Put instructions where the template reads them.
    written = [dict(message) for message in messages]
    for message in written:
        if message["role"] == "developer" and not traits.developer:
            message["role"] = "system"
    written = _place_instructions(written, traits, with_tools, changes)
    # 2. Write calls, results and reasoning.
    names: dict[str, str] = {}
    for message in written:
        for call in message.get("tool_calls") or ():
            names[call["id"]] = call["function"]["name"]
        _write_fields(message, traits, names)
    written = _split_calls(written, traits, changes)
    # 3. Join turns that must alternate, and give each content its form.
    written = _join_turns(written, traits, changes)
    for message in written:
        _write_content(message, traits)
    return Written(written, tuple(changes), tuple(dropped))


def _refuse_unwritten(
    messages: Sequence[Mapping[str, Any]], traits: TemplateTraits, with_tools: bool
) -> None:
    """Raise InvalidRequestError for the first thing that the template would leave out."""

    def refuse(index: int, field: str, what: str) -> None:
        raise InvalidRequestError(
            f"messages[{index}]: the model's chat template does not write {what}",
            f"messages[{index}].{field}",
        )

    users = 0
    for index, message in enumerate(messages):
        role, calls = message["role"], message.get("tool_calls")
        users += role == "user"
        is_moved = role in _INSTRUCTIONS and traits.system in ("none", "refused")
        if (role == "user" or is_moved) and traits.user == "none":
            refuse(index, "content", "the text of users")
        if users > 1 and not traits.history:
            refuse(index, "content", "more than one turn")
        answers = role == "assistant" and message.get("content") and not calls
        if answers and traits.assistant == "none":
            refuse(index, "content", "the text of the assistant")
        if role == "tool" and traits.tool == "none":
            refuse(index, "role", "the results of tools")
        if calls and not (traits.calls and (with_tools or traits.calls_without_tools)):
            without = "" if not traits.calls else " if no tools are offered"
            refuse(index, "tool_calls", f"the calls of earlier turns{without}")
        if calls and len(calls) > 1 and traits.parallel_calls == "none":
            refuse(index, "tool_calls", "several calls of one turn")


def _unread(messages: Sequence[Mapping[str, Any]], traits: TemplateTraits) -> list[str]:
    """Return the paths of fields that change nothing, although they are set."""
    paths = []
    for index, message in enumerate(messages):
        if message["role"] == "user" and message.get("name") and not traits.user_name:
            paths.append(f"messages[{index}].name")
        if (
            message.get("tool_calls")
            and message.get("content")
            and traits.content_beside_calls == "none"
        ):
            paths.append(f"messages[{index}].content")
    return paths


def _place_instructions(
    messages: list[Message], traits: TemplateTraits, with_tools: bool, changes: dict[str, None]
) -> list[Message]:
    """Return the messages with each system message where the template writes it."""
    # 1. Take the instructions at the beginning together, unless the template writes several.
    start = 0
    while start < len(messages) and messages[start]["role"] in _INSTRUCTIONS:
        start += 1
    head, rest = messages[:start], messages[start:]
    if len(head) > 1 and not traits.several_systems:
        head = [_joined(head)]
        changes[SYSTEM_JOINED] = None
    # 2. Put those that it does not write there before the next user message.
    is_alone = all(message["role"] != "user" for message in messages)
    moves_head = (
        traits.system in ("none", "refused")
        or (with_tools and not traits.system_beside_tools)
        or (is_alone and not traits.lone_system)
        or (messages[-1]["role"] != "user" and not traits.lasting_system)
    )
    waiting: list[Message] = []
    placed: list[Message] = []
    if moves_head:
        waiting, head = head, []
    for message in rest:
        if message["role"] in _INSTRUCTIONS and (moves_head or not traits.late_system):
            waiting.append(message)
        elif message["role"] == "user" and waiting:
            changes[SYSTEM_IN_USER] = None
            placed.append({**message, "content": _joined([*waiting, message])["content"]})
            waiting = []
        else:
            placed.append(message)
    if waiting:
        changes[SYSTEM_IN_USER] = None
        placed.append({**_joined(waiting), "role": "user"})
    return [*head, *placed]


def _write_fields(message: Message, traits: TemplateTraits, names: Mapping[str, str]) -> None:
    """Rewrite calls, ids, the name of a called function and reasoning of one message in place.
    `names` are those of the calls so far, by their ids."""
    if message["role"] == "tool":
        call_id = message.get("tool_call_id")
        if traits.tool_name and call_id is not None and call_id in names:
            message.setdefault("name", names[call_id])
        if call_id is not None:
            message["tool_call_id"] = _written_id(call_id, traits)
    if message.get("tool_calls"):
        message["tool_calls"] = [_written_call(call, traits) for call in message["tool_calls"]]
    else:
        message.pop("tool_calls", None)  # some templates only ask whether there is a list
    reasoning = message.pop("reasoning_content", None)
    if reasoning is None:
        return
    crowded = message.get("tool_calls") and message.get("content")
    if traits.reasoning_beside_content or not crowded:
        message[traits.reasoning or "reasoning_content"] = reasoning


def _written_call(call: Mapping[str, Any], traits: TemplateTraits) -> Message:
    function = dict(call["function"])
    if traits.arguments == "object":
        function["arguments"] = parse_arguments(function["arguments"])
    written = {**call, "id": _written_id(call["id"], traits), "function": function}
    return {**written, **function} if traits.flat_calls else written


def _written_id(call_id: str, traits: TemplateTraits) -> str:
    """Return the id of a call. If ids must be short, others become nine digits of their hash, the
    same ones in a call and in its result."""
    if not traits.short_call_ids or _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _split_calls(
    messages: list[Message], traits: TemplateTraits, changes: dict[str, None]
) -> list[Message]:
    """Return the messages with turns split that the template does not write as one: text goes
    before its calls, and each of several calls before its own result."""
    split: list[Message] = []
    waiting = deque(messages)
    while waiting:
        message = waiting.popleft()
        calls = message.get("tool_calls")
        if not calls:
            split.append(message)
            continue
        if message.get("content") and traits.content_beside_calls == "apart":
            changes[CALLS_APART] = None
            split.append({"role": "assistant", "content": message["content"]})
            message = {**message, "content": ""}
        if len(calls) == 1 or traits.parallel_calls == "together":
            split.append(message)
            continue
        changes[CALLS_APART] = None
        results: list[Message] = []
        while waiting and waiting[0]["role"] == "tool":
            results.append(waiting.popleft())
        for number, call in enumerate(calls):
            first = message if number == 0 else {"role": "assistant", "content": ""}
            split.append({**first, "tool_calls": [call]})
            # A result without an id belongs to the next call. (Ids may come again in later turns.)
            for result in results:
                if result.get("tool_call_id") in (call["id"], None):
                    split.append(result)
                    results.remove(result)
                    break
        split += results
    return split


def _join_turns(
    messages: list[Message], traits: TemplateTraits, changes: dict[str, None]
) -> list[Message]:
    """Return the messages with neighbours of one role joined if the template refuses or drops
    them."""
    alone = {"user": traits.repeated_user, "assistant": traits.repeated_assistant}
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        if (
            before is None
            or before["role"] != message["role"]
            or alone.get(message["role"], True)
            or before.get("tool_calls")
            or message.get("tool_calls")
        ):
            joined.append(message)
            continue
        changes[TURNS_JOINED] = None
        joined[-1] = {**before, **message, "content": _joined([before, message])["content"]}
    return joined


def _joined(messages: Sequence[Message]) -> Message:
    """Return the first message with the contents of all, separated by an empty line."""
    contents = [message.get("content") or "" for message in messages]
    if all(isinstance(content, str) for content in contents):
        return {**messages[0], "content": "\n\n".join(filter(None, contents))}
    parts: list[Message] = []
    for content in filter(None, contents):
        parts += [{"type": "text", "text": "\n\n"}] if parts else []
        parts += _as_parts(content)
    return {**messages[0], "content": parts}


def _write_content(message: Message, traits: TemplateTraits) -> None:
    """Give the content of a message the form that the template reads for its role, in place."""
    forms: dict[str, Form] = {
        "user": traits.user,
        "assistant": traits.assistant,
        "tool": traits.tool,
    }
    form = forms.get(message["role"], traits.system)
    content = message.get("content")
    if not content and message.get("tool_calls") and traits.empty_content != "empty":
        message["content"] = None
        if traits.empty_content == "missing":
            del message["content"]
    elif form == "parts":
        message["content"] = _as_parts(content or "")
    elif form != "either" and isinstance(content, list):
        message["content"] = "\n".join(part["text"] for part in content)


def _as_parts(content: str | list[Message]) -> list[Message]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []
