"""`quire doctor`: a line for each thing that a server needs of its machine."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.text import Text

from .doctor_checks import Check, all_checks

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def run(arguments: argparse.Namespace) -> int:
    """Print the checks as they are made, and return 1 if one of them failed."""
    made: list[Check] = []
    console = Console(highlight=False, soft_wrap=True)
    for check in all_checks():
        made.append(check)
        if not arguments.json:
            line = Text(f"{check.status:<5}", style=_STYLES[check.status])
            line.append(f"{check.name:<17}", style="bold").append(check.text, style="default")
            console.print(line)
    failed = [check for check in made if check.status == "fail"]
    if arguments.json:
        print(
            json.dumps({"ok": not failed, "checks": [check._asdict() for check in made]}, indent=2)
        )
    elif failed:
        console.print(f"\n{len(failed)} of {len(made)} checks failed.", style="bold red")
    return int(bool(failed))
