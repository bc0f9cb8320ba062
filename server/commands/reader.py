"""Where questions come from: a terminal with editing and history, a plain terminal, or a pipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .slash import NAMES

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "> "


class Reader(Protocol):
    """Gives one question after the other."""

    def read(self) -> str:
        """Return the next question, of one or more lines. Raises EOFError after the last one, and
        KeyboardInterrupt if Ctrl-C is pressed."""


def make_reader() -> Reader:
    """Return the reader that fits this process's input and terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return PlainReader("")
    if os.environ.get("TERM", "dumb") in ("dumb", ""):
        return PlainReader(PROMPT)
    return TerminalReader(history_file())


def history_file() -> Path | None:
    """Return the file of the questions of earlier chats, made for this user alone; None if its
    folder cannot be written."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "quire" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return None
    return path if os.access(path, os.W_OK) else None


class PlainReader:
    """Reads lines as they come; one that ends with a backslash goes on in the next."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt

    def read(self) -> str:
        lines: list[str] = []
        while True:
            if self._prompt:
                print(self._prompt if not lines else "  ", end="", flush=True)
            line = sys.stdin.readline()
            if not line and not lines:
                raise EOFError
            lines.append(line.rstrip("\n").removesuffix("\\"))
            if not line.rstrip("\n").endswith("\\"):
                return "\n".join(lines)


class TerminalReader:
    """Reads with prompt_toolkit: editing over several lines, pasting, history, /commands by TAB."""

    def __init__(self, history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.output import ColorDepth

        commands = WordCompleter([f"/{name}" for name in NAMES], sentence=True)
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation="  ",
            history=InMemoryHistory() if history is None else FileHistory(str(history)),
            completer=commands,
            complete_while_typing=False,
            key_bindings=_keys(),
            color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
        )

    def read(self) -> str:
        return self._session.prompt()


def _keys() -> KeyBindings:
    """Return the keys: Enter sends, unless a backslash is before it; Alt+Enter begins a line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
