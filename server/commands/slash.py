"""What a line that begins with / does to a conversation."""

from __future__ import annotations

import difflib
import json
import textwrap
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from .conversation import PARAMETERS, Conversation, ConversationError

COMMANDS = {
    "help": "show this list",
    "system TEXT": "set the system prompt; without TEXT, remove it",
    "params": "show model, system prompt and parameters",
    "model NAME": "talk to another model of the server",
    "undo": "take the last question and its answer back",
    "retry": "ask the last question again",
    "reset": "forget the conversation; parameters and system prompt stay",
    "save FILE": "write the conversation to a file, as JSON",
    "load FILE": "read it from such a file",
    "exit": "leave, as Ctrl-D does",
}
"""The commands beside those that set parameters."""
NAMES = tuple(sorted({*(name.split()[0] for name in COMMANDS), *PARAMETERS, "quit"}))


class Next(Enum):
    """What follows a command: the next line, an answer, or the end."""

    READ = "read"
    ANSWER = "answer"
    EXIT = "exit"


class Outcome(NamedTuple):
    """What to tell the person, and what to do then."""

    said: str = ""
    then: Next = Next.READ


def run(line: str, conversation: Conversation, models: list[str]) -> Outcome:
    """Carry out a command. `models` are the names that the server serves.

    Raises ConversationError, which says what is wrong; nothing is changed then.
    """
    name, _, rest = line.removeprefix("/").strip().partition(" ")
    name, rest = name.lower().replace("-", "_"), rest.strip()
    if name in PARAMETERS:
        if rest:
            conversation.set_parameter(name, rest)
        value = conversation.parameters.get(name, "the server's default")
        return Outcome(f"{name}: {value}")
    match name:
        case "help":
            return Outcome(help_text())
        case "exit" | "quit":
            return Outcome(then=Next.EXIT)
        case "system":
            conversation.system = rest or None
            return Outcome("system prompt set" if rest else "no system prompt")
        case "params":
            return Outcome(_parameters(conversation))
        case "model":
            return Outcome(_choose_model(conversation, rest, models))
        case "undo":
            conversation.undo()
            return Outcome(f"{len(conversation.messages)} messages are left")
        case "retry":
            conversation.ask(conversation.undo())
            return Outcome(then=Next.ANSWER)
        case "reset":
            conversation.messages.clear()
            return Outcome("the conversation is empty")
        case "save" | "load":
            if not rest:
                raise ConversationError(f"/{name} needs the name of a file")
            path = Path(rest).expanduser()
            getattr(conversation, name)(path)
            verb = "written to" if name == "save" else "read from"
            return Outcome(f"{len(conversation.messages)} messages {verb} {path}")
        case "image" | "images" | "file" | "audio":
            raise ConversationError("only text can be sent: images, audio and files are not read")
    close = difflib.get_close_matches(name, NAMES, 1, cutoff=0.6)
    hint = f"did you mean /{close[0]}?" if close else "/help lists all commands"
    raise ConversationError(f"there is no command /{name}: {hint}")


def help_text() -> str:
    """Return the list of commands, and how to write more than a line."""
    width = max(map(len, COMMANDS)) + 3
    lines = [f"/{name}".ljust(width) + text for name, text in COMMANDS.items()]
    lines.append("/NAME VALUE".ljust(width) + "set a parameter; default as VALUE takes it back:")
    names = ", ".join(f"/{name}" for name in PARAMETERS)
    lines += [" " * width + row for row in textwrap.wrap(names, 60)]
    lines.append("A line that ends with \\ goes on; in a terminal, Alt+Enter begins a new line.")
    lines.append("Ctrl-C stops an answer. A question that begins with / is written with //.")
    return "\n".join(lines)


def _parameters(conversation: Conversation) -> str:
    set_ = {"model": conversation.model, "system": conversation.system, **conversation.parameters}
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in set_.items())


def _choose_model(conversation: Conversation, name: str, models: list[str]) -> str:
    if name and name not in models:
        raise ConversationError(f"the server has no model {name}; it has {', '.join(models)}")
    if name:
        conversation.model = name
    return f"model: {conversation.model} (of {', '.join(models)})"
