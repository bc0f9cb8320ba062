"""Claude Code against a server with a scripted model: whole loops of call, result and answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .agents import Answer, Model, run, serving
from .conftest import KEY, command


def claude(folder: Path, answer: Answer) -> tuple[dict[str, Any], Model]:
    """Run Claude Code once with a scripted model; return its result and the model."""
    work = folder / "work"
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
    result: dict[str, Any] = json.loads(output)
    assert (result["is_error"], result["num_turns"]) == (False, 2)
    return result, model


def test_claude_code_runs_a_command_and_answers(tmp_path: Path) -> None:
    arguments = {"command": "cat notes.txt", "description": "Read the notes"}
    call = json.dumps({"name": "Bash", "arguments": arguments})

    def answer(prompt: str) -> str:
        if "Buy plums." in prompt:
            return "<think>It says plums.</think>You need plums."
        return f"<think>A note may help.</think>I look.\n<tool_call>{call}</tool_call>"

    result, model = claude(tmp_path, answer)
    assert result["result"] == "You need plums."
    usage = result["usage"]
    assert 0 < usage["output_tokens_details"]["thinking_tokens"] < usage["output_tokens"]
    second = model.prompts[-1]
    turn = second.split("What do I need?")[1]
    assert "<think>A note may help.</think>I look." in turn and "cat notes.txt" in turn
    assert "x-anthropic-billing-header" not in second


def test_claude_code_finds_a_deferred_tool(tmp_path: Path) -> None:
    call = json.dumps({"name": "ToolSearch", "arguments": {"query": "select:WebFetch"}})

    def answer(prompt: str) -> str:
        if "The tool WebFetch can be called now." in prompt:
            return "Done."
        return f"<tool_call>{call}</tool_call>"

    result, model = claude(tmp_path, answer)
    assert result["result"] == "Done."
    offered = '{"type": "function", "function": {"name": "WebFetch"'
    assert [offered in prompt for prompt in model.prompts] == [False, True]
    assert not any("DeferredToolPlaceholder" in prompt for prompt in model.prompts)
