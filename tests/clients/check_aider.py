"""aider against a server with a scripted model: real edits and commits in a git repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .agents import Answer, Model, run, serving
from .conftest import KEY, command

NOTES = "Buy apples.\nCall Anna.\n"
AUTHOR = {"GIT_AUTHOR_NAME": "Test", "GIT_AUTHOR_EMAIL": "test@example.com"}
COMMITTER = {"GIT_COMMITTER_NAME": "Test", "GIT_COMMITTER_EMAIL": "test@example.com"}


def _replace(old: str, new: str) -> str:
    """Return an edit in aider's format `diff`."""
    fence = "```"
    block = f"<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE"
    return f"notes.txt\n{fence}\n{block}\n{fence}\n"


def aider(folder: Path, answer: Answer, *flags: str) -> tuple[str, Model]:
    """Run aider once on a repository with notes.txt; return the commits' subjects and the model."""
    work = folder / "work"
    work.mkdir()
    (work / "notes.txt").write_text(NOTES, encoding="utf-8")
    metadata = folder / "models.json"
    limits = {"max_input_tokens": 100_000, "max_output_tokens": 10_000, "mode": "chat"}
    metadata.write_text(json.dumps({"openai/scripted": limits}), encoding="utf-8")
    model = Model(answer)
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Notes"]):
        run([command("git"), *arguments], work, **AUTHOR, **COMMITTER)
    with serving(model, "scripted") as address:
        run(
            [
                *(command("aider"), "--model", "openai/scripted", "--yes-always"),
                *("--model-metadata-file", str(metadata), "--no-show-model-warnings"),
                *("--no-check-update", "--no-show-release-notes", "--analytics-disable"),
                *("--no-gitignore", "--no-detect-urls", "--no-fancy-input", "--no-pretty"),
                *("--message", "Buy plums instead.", *flags, "notes.txt"),
            ],
            work,
            OPENAI_API_BASE=f"{address}/v1",
            OPENAI_API_KEY=KEY,
            LITELLM_LOCAL_MODEL_COST_MAP="True",
            **AUTHOR,
            **COMMITTER,
        )
    log = run([command("git"), "log", "--format=%s"], work)
    assert run([command("git"), "status", "--short", "--untracked-files=no"], work) == ""
    return log, model


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_aider_edits_a_file_and_commits(tmp_path: Path, stream: str) -> None:
    def answer(prompt: str) -> str:
        if "commit message" in prompt[:2000]:
            return "docs: Buy plums"
        return "<think>Plums.</think>I change it.\n\n" + _replace("Buy apples.", "Buy plums ✓.")

    log, model = aider(tmp_path, answer, "--edit-format", "diff", stream)
    notes = (tmp_path / "work/notes.txt").read_text(encoding="utf-8")
    assert notes == "Buy plums ✓.\nCall Anna.\n"
    assert log.splitlines() == ["docs: Buy plums", "Notes"]
    assert len(model.prompts) == 2 and "Call Anna." in model.prompts[0]


def test_aider_says_that_an_edit_failed(tmp_path: Path) -> None:
    def answer(prompt: str) -> str:
        if "commit message" in prompt[:2000]:
            return "docs: Buy plums"
        if "SEARCH/REPLACE block failed to match" in prompt:
            return _replace("Buy apples.", "Buy plums.")
        return _replace("Buy pears, and much else.", "Buy plums.")

    log, model = aider(tmp_path, answer, "--edit-format", "diff")
    notes = (tmp_path / "work/notes.txt").read_text(encoding="utf-8")
    assert notes == "Buy plums.\nCall Anna.\n"
    assert len(model.prompts) == 3 and len(log.splitlines()) == 2
