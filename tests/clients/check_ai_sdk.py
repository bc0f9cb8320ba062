"""Vercel's AI SDK with its provider for OpenAI-compatible servers. ai_sdk.mjs holds the checks."""

from __future__ import annotations

from pathlib import Path

from .agents import Model, run, serving
from .conftest import KEY, command
from .scripted import call

SCRIPT = Path(__file__).with_name("ai_sdk.mjs")


def _answer(prompt: str) -> str:
    report = "Report how" in prompt  # as structured output: before calls, its grammar has no text
    if "Thanks" in prompt:
        return "You are welcome."
    if prompt.count('"degrees":21') == 2:
        return '{"degrees": 21}' if report else "21 degrees in both."
    calls = call("get_weather", city="Paris") + "\n" + call("get_weather", city="Oslo")
    return f"<think>Two cities.</think>{'' if report else 'I ask.'}\n{calls}"


def test_the_ai_sdk(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    model = Model(_answer)
    with serving(model, "scripted") as address:
        output = run(
            [command("node"), "--test", "--test-reporter=spec", str(SCRIPT)],
            folder,
            DEMO_URL=server,
            SCRIPTED_URL=address,
            QUIRE_KEY=KEY,
        )
    assert "pass 6\n" in output and "skipped 0\n" in output, output
    # The reasoning of a turn is returned to the model with the results of its calls.
    later = [prompt for prompt in model.prompts if '"degrees":21' in prompt]
    assert len(later) == 4 and all("<think>Two cities.</think>" in prompt for prompt in later)
