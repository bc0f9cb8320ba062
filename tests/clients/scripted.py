"""A scripted model in a process of its own, for clients that are not installed in .venv."""

from __future__ import annotations

import json
import subprocess
from typing import Any

SCRIPTED = "scripted"
"""The name that the model is served under."""


def call(tool: str, /, **arguments: Any) -> str:
    """Return a call of a tool as the model writes it."""
    return f"<tool_call>{json.dumps({'name': tool, 'arguments': arguments})}</tool_call>"


class ScriptedModel:
    """The served model. Its text is that of the first rule whose parts are all in the prompt."""

    def __init__(self, server: list[str]) -> None:
        """Start the server by the command that runs scripted_server.py."""
        self._process = subprocess.Popen(
            server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address: str = self._read()["address"]

    def play(self, *rules: tuple[list[str], str]) -> None:
        """Set the script: pairs of parts of a prompt and the text. Forget the prompts."""
        self._ask({"rules": [{"if": parts, "say": text} for parts, text in rules]})

    @property
    def prompts(self) -> list[str]:
        """The prompts since `play`, in order."""
        prompts: list[str] = self._ask({"prompts": True})["prompts"]
        return prompts

    def close(self) -> None:
        """Stop the server, and fail if it does not end by itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            assert self._process.wait(timeout=30) == 0
        finally:
            self._process.kill()

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the scripted server has ended"
        return json.loads(line)
