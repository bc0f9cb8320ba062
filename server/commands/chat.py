"""`quire chat`: questions and answers in a terminal, with a model that runs or that is started."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from .answer import show, use_utf8
from .conversation import PARAMETERS, Conversation, ConversationError
from .http_client import RequestError
from .local_server import Endpoint, endpoint
from .reader import Reader, make_reader
from .slash import Next, Outcome
from .slash import run as run_command


def run(arguments: argparse.Namespace) -> int:
    """Chat until the input ends, and return the exit code. Raises StartupError."""
    use_utf8()
    people = Console(stderr=not sys.stdout.isatty(), highlight=False)
    with endpoint(arguments.model, arguments.api_key, arguments.serve_flags, people) as found:
        models = [str(card["id"]) for card in found.server.models()]
        conversation = Conversation(found.model, arguments.system)
        conversation.parameters = {
            name: value
            for name in PARAMETERS
            if (value := getattr(arguments, name, None)) is not None
        }
        reader = make_reader()
        if people.is_terminal:
            where = "started for this chat" if found.is_own else f"at {found.server.url}"
            people.print(
                f"{found.model}, {where}. /help lists commands, Ctrl-D leaves.\n", style="dim"
            )
        return Chat(found, conversation, reader, models, people).run()


class Chat:
    """One chat: asks, prints and goes on. `people` is a console for what is no answer."""

    def __init__(
        self,
        found: Endpoint,
        conversation: Conversation,
        reader: Reader,
        models: list[str],
        people: Console,
    ) -> None:
        self._server = found.server
        self._conversation = conversation
        self._reader = reader
        self._models = models
        self._people = people
        self._failed = False
        """Whether the last question got no answer."""

    def run(self) -> int:
        """Chat until the input ends. Return 1 if the last question got no answer, else 0."""
        while True:
            try:
                line = self._reader.read()
            except KeyboardInterrupt:  # clears the line
                self._say("(Ctrl-D leaves)")
                continue
            except EOFError:
                return int(self._failed)
            if not line.strip():
                continue
            try:
                outcome = self._take(line)
            except ConversationError as error:
                self._complain(error.message)
                continue
            if outcome.said:
                self._say(outcome.said)
            if outcome.then is Next.EXIT:
                return int(self._failed)
            if outcome.then is Next.ANSWER:
                self._answer()

    def _take(self, line: str) -> Outcome:
        """Carry a command out, or add a question."""
        if line.startswith("/") and not line.startswith("//"):
            return run_command(line, self._conversation, self._models)
        self._conversation.ask(line[1:] if line.startswith("//") else line)
        return Outcome(then=Next.ANSWER)

    def _answer(self) -> None:
        """Ask for an answer and print it. A question that is refused is taken back."""
        is_terminal = sys.stdout.isatty()
        dim = is_terminal and self._people.color_system is not None and not self._people.no_color
        chunks = self._server.chat(self._conversation.body())
        try:
            answer = show(chunks, sys.stdout, sys.stdout if is_terminal else None, dim=dim)
        except RequestError as error:
            self._failed = True
            self._conversation.undo()
            self._complain(error.message)
            return
        self._failed = False
        self._conversation.answer(answer.text)
        print(flush=True)
        if is_terminal:
            stopped = "stopped; " if answer.was_stopped and answer.usage else ""
            self._say(stopped + answer.summary())

    def _say(self, text: str) -> None:
        if self._people.is_terminal:
            self._people.print(text + "\n", style="dim", markup=False)

    def _complain(self, text: str) -> None:
        if self._people.is_terminal:
            self._people.print(text + "\n", style="red", markup=False)
        else:
            print(f"quire: {text}", file=sys.stderr)
