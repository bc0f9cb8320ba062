"""A conversation: its messages, the parameters of its requests, and the file that holds both."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARAMETERS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "max_tokens": int,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "reasoning_effort": str,
}
"""Parameters of requests that a conversation can set, and how their values are read."""
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff"})


class ConversationError(Exception):
    """Something that a person asked for cannot be done; the conversation is as before.

    It is no QuireError, since no server answers with it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass
class Conversation:
    """What is sent with the next question. `messages` has no system message; that is `system`."""

    model: str
    system: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def set_parameter(self, name: str, text: str) -> None:
        """Set a parameter from its text, or leave it to the server if the text is "default".

        Raises ConversationError for a name or a value that makes no sense; bounds are the server's.
        """
        read = PARAMETERS.get(name)
        if read is None:
            raise ConversationError(f"there is no parameter {name}: {', '.join(PARAMETERS)}")
        if text == "default":
            self.parameters.pop(name, None)
            return
        try:
            self.parameters[name] = read(text)
        except ValueError:
            kind = "a whole number" if read is int else "a number"
            raise ConversationError(f"{name} takes {kind} or default, not {text!r}") from None

    def body(self) -> dict[str, Any]:
        """Return the body of the request for the next answer."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {"model": self.model, "messages": [*system, *self.messages], **self.parameters}

    def ask(self, question: str) -> None:
        """Add a question. Raises ConversationError if it is the path of an image."""
        path = question.strip().strip("'\"")
        if (
            "\n" not in path
            and Path(path).suffix.lower() in IMAGE_SUFFIXES
            and Path(path).is_file()
        ):
            raise ConversationError(f"{path} is an image, and only text can be sent")
        self.messages.append({"role": "user", "content": question})

    def answer(self, text: str) -> None:
        """Add an answer."""
        self.messages.append({"role": "assistant", "content": text})

    def undo(self) -> str:
        """Remove the last question with its answer, and return it. Raises ConversationError."""
        places = [i for i, one in enumerate(self.messages) if one["role"] == "user"]
        if not places:
            raise ConversationError("there is no question yet")
        question = self.messages[places[-1]]["content"]
        del self.messages[places[-1] :]
        return question

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, which `load` reads. Raises ConversationError."""
        values = {
            "model": self.model,
            "system": self.system,
            "parameters": self.parameters,
            "messages": self.messages,
        }
        try:
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise ConversationError(f"cannot write {path}: {error.strerror}") from error

    def load(self, path: Path) -> None:
        """Replace all but the model by what `save` wrote. Raises ConversationError."""
        try:
            values = json.loads(path.read_text("utf-8"))
            system, parameters = values["system"], dict(values["parameters"])
            messages = [
                {"role": str(one["role"]), "content": str(one["content"])}
                for one in values["messages"]
            ]
        except OSError as error:
            raise ConversationError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ConversationError(f"{path} is no saved conversation") from error
        unknown = parameters.keys() - PARAMETERS.keys()
        if unknown or not isinstance(system, str | None):
            raise ConversationError(f"{path} is no saved conversation of this version")
        self.system, self.parameters, self.messages = system, parameters, messages
