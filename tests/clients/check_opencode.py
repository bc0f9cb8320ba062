"""opencode against a server with a scripted model: one-shot runs with tools that change files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .agents import Answer, Model, run, serving
from .conftest import KEY, command
from .scripted import call


def opencode(folder: Path, answer: Answer) -> tuple[list[dict[str, Any]], Model]:
    """Run opencode once with a scripted model; return its events and the model."""
    work = folder / "work"
    work.mkdir()
    (work / "notes.txt").write_text("Buy plums.\n", encoding="utf-8")
    model = Model(answer)
    with serving(model, "scripted") as address:
        provider = {
            "npm": "@ai-sdk/openai-compatible",
            "name": "quire",
            "options": {"baseURL": f"{address}/v1", "apiKey": KEY},
            "models": {
                "scripted": {
                    "name": "scripted",
                    "tool_call": True,
                    "reasoning": True,
                    "interleaved": {"field": "reasoning_content"},
                    "limit": {"context": 200_000, "output": 8_000},
                }
            },
        }
        config = {
            "provider": {"quire": provider},
            "enabled_providers": ["quire"],
            "model": "quire/scripted",
            "small_model": "quire/scripted",
            "autoupdate": False,
            "share": "disabled",
        }
        (work / "opencode.json").write_text(json.dumps(config), encoding="utf-8")
        output = run(
            [command("opencode"), "run", "--format", "json", "--pure", "--auto", "What do I need?"],
            work,
            OPENCODE_DISABLE_AUTOUPDATE="1",
            OPENCODE_DISABLE_MODELS_FETCH="1",
            OPENCODE_DISABLE_LSP_DOWNLOAD="1",
            OPENCODE_DISABLE_DEFAULT_PLUGINS="1",
        )
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], model


def _texts(events: list[dict[str, Any]]) -> list[str]:
    return [event["part"]["text"] for event in events if event["type"] == "text"]


def test_opencode_reads_edits_and_answers(tmp_path: Path) -> None:
    notes = tmp_path / "work/notes.txt"

    def answer(prompt: str) -> str:
        if "title generator" in prompt:
            return "Plums"
        if "Edit applied successfully" in prompt:
            return "<think>It is done.</think>You need plums."
        if "1: Buy plums." in prompt:
            path = str(notes)
            return call("edit", filePath=path, oldString="Buy plums.", newString="Buy 7 plums ✓.")
        return "<think>A note may help.</think>I look.\n" + call("read", filePath=str(notes))

    events, model = opencode(tmp_path, answer)
    assert _texts(events)[-1] == "You need plums.", events
    assert notes.read_text(encoding="utf-8") == "Buy 7 plums ✓.\n"
    last = model.prompts[-1]
    assert "<think>A note may help.</think>I look." in last and "Edit applied successfully" in last
