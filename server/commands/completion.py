"""Completion of quire's command lines in bash, zsh and fish, by argcomplete."""

from __future__ import annotations

import argparse
import glob
import os
from typing import Any

SHELLS = ("bash", "zsh", "fish")


def run(arguments: argparse.Namespace) -> int:
    """Print the script of a shell and return 0."""
    from argcomplete import shellcode  # type: ignore[attr-defined]

    print(shellcode(["quire"], shell=arguments.shell))
    return 0


def is_asked() -> bool:
    """Return whether a shell runs this process to complete a command line."""
    return "_ARGCOMPLETE" in os.environ


def answer(parser: argparse.ArgumentParser) -> None:
    """Tell the shell how its command line may go on, and exit."""
    from argcomplete import autocomplete

    autocomplete(parser, append_space=False)


def with_models(action: argparse.Action) -> None:
    """Let an argument be completed by the names of models, and by files."""
    action.completer = complete_model  # type: ignore[attr-defined]


def with_choices(action: argparse.Action, choices: tuple[str, ...]) -> None:
    """Let a flag be completed by its values, which Settings checks rather than argparse."""
    if choices:
        action.completer = lambda **_: choices  # type: ignore[attr-defined]


def complete_model(prefix: str, **_: Any) -> list[str]:
    """Return the models that begin so: known by name, in the hub's local cache, or files."""
    from ...engine.checkpoints.hub import cached_models
    from ...engine.checkpoints.source import PACKAGED_MODELS

    files = [path + "/" * os.path.isdir(path) for path in sorted(glob.glob(prefix + "*"))]
    return [
        name for name in (*PACKAGED_MODELS, *cached_models()) if name.startswith(prefix)
    ] + files
