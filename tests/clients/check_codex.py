"""Codex CLI against a server with a scripted model: whole loops of call, result and answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .agents import Answer, Model, run, serving
from .conftest import KEY, command

CONFIG = """
model = "{model}"
model_provider = "quire"
[model_providers.quire]
name = "quire"
base_url = "{address}/v1"
wire_api = "responses"
env_key = "QUIRE_KEY"
request_max_retries = 0
stream_max_retries = 0
"""


def codex(folder: Path, answer: Answer, *, model: str) -> tuple[list[dict[str, Any]], Model]:
    """Run Codex once with a scripted model; return its events and the model."""
    work, home = folder / "work", folder / "codex"
    work.mkdir()
    home.mkdir()
    (work / "notes.txt").write_text("Buy plums.", encoding="utf-8")
    scripted = Model(answer)
    with serving(scripted, model) as address:
        config = CONFIG.format(model=model, address=address)
        (home / "config.toml").write_text(config, encoding="utf-8")
        arguments = ["exec", "--json", "--skip-git-repo-check"]
        arguments += ["--dangerously-bypass-approvals-and-sandbox", "What do I need?"]
        output = run([command("codex"), *arguments], work, CODEX_HOME=str(home), QUIRE_KEY=KEY)
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return events, scripted


def final_message(events: list[dict[str, Any]]) -> str:
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    texts: list[str] = [item["text"] for item in items if item["type"] == "agent_message"]
    return texts[-1]


def test_codex_runs_a_function_and_answers(tmp_path: Path) -> None:
    call = {"name": "exec_command", "arguments": {"cmd": "cat notes.txt"}}

    def answer(prompt: str) -> str:
        if "Buy plums." in prompt:
            return "<think>It says plums.</think>You need plums."
        return f"<think>A note may help.</think>I look.\n<tool_call>{json.dumps(call)}</tool_call>"

    events, model = codex(tmp_path, answer, model="scripted")
    assert final_message(events) == "You need plums."
    first, second = model.prompts
    assert "multi_agent_v1__" in first and '"web_search"' not in first
    turn = second.split("What do I need?")[1]
    assert "<think>A note may help.</think>I look." in turn and "cat notes.txt" in turn


def test_codex_applies_a_patch_of_a_custom_tool(tmp_path: Path) -> None:
    patch = "*** Begin Patch\n*** Add File: list.txt\n+plums ✓\n*** End Patch\n"
    call = {"name": "apply_patch", "arguments": {"input": patch}}

    def answer(prompt: str) -> str:
        if "plums ✓" in prompt:
            return "Done."
        return f"<tool_call>{json.dumps(call)}</tool_call>"

    # Codex offers this tool to models that it knows.
    events, model = codex(tmp_path, answer, model="gpt-5.5")
    assert final_message(events) == "Done."
    assert (tmp_path / "work/list.txt").read_text(encoding="utf-8") == "plums ✓\n"
    assert "The input must follow this grammar (lark)" in model.prompts[0]


def test_codex_finds_a_deferred_tool(tmp_path: Path) -> None:
    call = {"name": "tool_search", "arguments": {"query": "spawn an agent"}}

    def answer(prompt: str) -> str:
        if "These tools can be called now: multi_agent" in prompt:
            return "Done."
        return f"<tool_call>{json.dumps(call)}</tool_call>"

    events, model = codex(tmp_path, answer, model="gpt-5.5")
    assert final_message(events) == "Done."
    offered = '{"type": "function", "function": {"name": "multi_agent_v1__spawn_agent"'
    assert [offered in prompt for prompt in model.prompts] == [False, True]
