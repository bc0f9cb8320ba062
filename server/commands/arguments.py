"""The command lines of `quire chat`, `complete`, `doctor` and `completion`."""

from __future__ import annotations

import argparse
from typing import Any

from .completion import SHELLS, with_models

_TARGET = (
    "Model to talk to, or the URL of a server. Without it: what runs at the default address, or "
    "else the demo model. A server is started if none serves the model."
)
_MORE = "Flags after -- are given to the server that is started: quire {} smollm2 -- --seed 1"


def add_chat(commands: Any) -> None:
    """Add `quire chat`."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model in the terminal. /help shows the commands of a chat.",
        epilog=_MORE.format("chat"),
        usage="quire chat [MODEL|URL] [flags] [-- flags of quire serve]",
        allow_abbrev=False,
    )
    with_models(parser.add_argument("model", nargs="?", metavar="MODEL|URL", help=_TARGET))
    _add_request(parser)


def add_complete(commands: Any) -> None:
    """Add `quire complete`."""
    parser = commands.add_parser(
        "complete",
        help="print the answer to one prompt",
        description="Print the answer to one prompt, which is an argument, or comes through a "
        "pipe, or both. Exit codes: 0 for an answer, 1 for a failure, 2 for a wrong command "
        "line, 130 after Ctrl-C.",
        epilog=_MORE.format("complete -m"),
        usage="quire complete [PROMPT] [-m MODEL|URL] [flags] [-- flags of quire serve]",
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="The prompt's words.")
    with_models(parser.add_argument("-m", "--model", metavar="MODEL|URL", help=_TARGET))
    parser.add_argument(
        "--raw", action="store_true", help="Continue the text itself, without a chat template."
    )
    parser.add_argument("--stats", action="store_true", help="Print tokens and rate to stderr.")
    _add_request(parser)


def add_doctor(commands: Any) -> None:
    """Add `quire doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine, and show what quire would use",
        description="Check this machine, and show what quire would use and why: a line each, with "
        "ok, warn or fail. The exit code is 1 if anything fails.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def add_completion(commands: Any) -> None:
    """Add `quire completion`."""
    parser = commands.add_parser(
        "completion",
        help="print the script that completes quire's command lines in a shell",
        description="Print the script that completes quire's command lines in a shell.",
        epilog='bash: eval "$(quire completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc, '
        "after compinit; fish: quire completion fish > ~/.config/fish/completions/quire.fish",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS), help="The shell.")


def _add_request(parser: argparse.ArgumentParser) -> None:
    """Add what is sent with each request."""
    add = parser.add_argument
    add("-s", "--system", metavar="TEXT", help="System prompt.")
    add("-t", "--temperature", type=float, metavar="NUMBER", help="0 to 2; 0 is greedy.")
    add("--top-p", type=float, metavar="SHARE", help="Draw among the likeliest of this share.")
    add("--top-k", type=int, metavar="N", help="Draw among the N likeliest tokens.")
    add("-n", "--max-tokens", type=int, metavar="N", help="Maximum tokens of an answer.")
    add("--seed", type=int, metavar="N", help="Draw the same tokens each time.")
    add("--api-key", metavar="KEY", help="Key of the server; better as QUIRE_API_KEY.")
