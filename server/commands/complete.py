"""`quire complete`: one prompt, one answer, made for pipes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console

from ...engine.errors import ConfigurationError
from .answer import show, use_utf8
from .conversation import PARAMETERS, Conversation
from .local_server import endpoint

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


def run(arguments: argparse.Namespace) -> int:
    """Print the answer to the prompt and return the exit code.

    0 for an answer, 130 after Ctrl-C. Raises StartupError, and ConfigurationError if there is no
    prompt.
    """
    use_utf8()
    prompt = read_prompt(arguments.prompt)
    people = Console(stderr=True, highlight=False)
    try:
        with endpoint(arguments.model, arguments.api_key, arguments.serve_flags, people) as found:
            parameters = {
                name: value
                for name in PARAMETERS
                if (value := getattr(arguments, name, None)) is not None
            }
            if arguments.raw:
                body: dict[str, Any] = {"model": found.model, "prompt": prompt, **parameters}
                chunks = found.server.complete(body)
            else:
                conversation = Conversation(found.model, arguments.system, parameters)
                conversation.ask(prompt)
                chunks = found.server.chat(conversation.body())
            answer = show(chunks, sys.stdout, None, dim=False)
        if sys.stdout.isatty() and not answer.text.endswith("\n"):
            print(flush=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    if arguments.stats:
        print(answer.summary(), file=sys.stderr)
    return INTERRUPTED if answer.was_stopped else 0


def read_prompt(words: list[str]) -> str:
    """Return the prompt: the arguments, then what comes through a pipe.

    Raises ConfigurationError if there is neither.
    """
    parts = [" ".join(words)] if words else []
    if not sys.stdin.isatty():
        piped = sys.stdin.read()
        parts += [piped] if piped.strip() else []
    if not "".join(parts).strip():
        raise ConfigurationError("complete needs a prompt: as an argument, or through a pipe")
    return "\n\n".join(parts)
