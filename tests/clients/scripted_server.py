"""Serve a scripted model to tests of another environment, whose packages are not those of .venv.

Commands come by standard input, one JSON object a line, and each is answered by a line:
{"rules": [...]} sets the script and forgets the prompts; {"prompts": true} returns them. The first
line that is printed holds the server's address. The server ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .agents import Model, serving
from .scripted import SCRIPTED


class Script:
    """Answers by rules. A rule is {"if": [parts of the prompt], "say": the model's text}."""

    def __init__(self) -> None:
        self.rules: list[dict[str, Any]] = []

    def answer(self, prompt: str) -> str:
        """Return the text of the first rule whose parts are all in the prompt."""
        for rule in self.rules:
            if all(part in prompt for part in rule["if"]):
                return str(rule["say"])
        return "The script has no answer."


def main() -> None:
    """Serve until standard input ends."""
    script = Script()
    model = Model(script.answer)
    with serving(model, SCRIPTED) as address:
        print(json.dumps({"address": address}), flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            answer: dict[str, Any] = {}
            if "rules" in command:
                script.rules = command["rules"]
                model.prompts.clear()
            else:
                answer["prompts"] = model.prompts
            print(json.dumps(answer), flush=True)
