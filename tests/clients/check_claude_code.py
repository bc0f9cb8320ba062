"""Claude Code against a server with a scripted model: a whole loop of call, result and answer."""

from __future__ import annotations

import json
from pathlib import Path

from .agents import Model, run, serving
from .conftest import KEY, command


def test_claude_code_runs_a_command_and_answers(tmp_path: Path) -> None:
    arguments = {"command": "cat notes.txt", "description": "Read the notes"}
    call = json.dumps({"name": "Bash", "arguments": arguments})

    def answer(prompt: str) -> str:
        if "Buy plums." in prompt:
            return "<think>It says plums.</think>You need plums."
        return f"<think>A note may help.</think>I look.\n<tool_call>{call}</tool_call>"

    work = tmp_path / "work"
    work.mkdir()
    (work / "notes.txt").write_text("Buy plums.", encoding="utf-8")
    model = Model(answer)
    with serving(model, "scripted") as address:
        output = run(
            [
                *(command("claude"), "-p", "What do I need?", "--model", "scripted"),
                *("--output-format", "json", "--allowedTools", "Bash(cat:*)"),
            ],
            work,
            ANTHROPIC_BASE_URL=address,
            ANTHROPIC_AUTH_TOKEN=KEY,
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
            DISABLE_AUTOUPDATER="1",
        )
    result = json.loads(output)
    assert (result["result"], result["is_error"], result["num_turns"]) == (
        "You need plums.", False, 2
    )  # fmt: skip
    assert result["usage"]["output_tokens"] > 0
    second = model.prompts[-1]
    turn = second.split("What do I need?")[1]
    assert "<think>A note may help.</think>I look." in turn and "cat notes.txt" in turn
    assert "x-anthropic-billing-header" not in second
