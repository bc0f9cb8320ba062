"""The examples of the documents that need nothing but curl and the `openai` package."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from .conftest import KEY
from .examples import FOLDER, output_of

ANSWER = "12 + 30 = 42"
SHOWN = {
    "chat.py": rf"{re.escape(ANSWER)}\n\d+ \+ \d+ tokens\n",
    "structure.py": r"Anna is 7\n",
    "agent.py": r'get_weather\(\{"city": ?"Paris"\}\)\nThe weather in Paris is sunny.\n',
}
ELSEWHERE = {"chat.mjs", "langchain_agent.py"}
"""Examples that `make clients` runs: check_node.py and check_langchain.py."""


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_prints_what_it_should(name: str, server: str) -> None:
    assert re.fullmatch(SHOWN[name], output_of(name, server))


def test_curl_gets_the_chat_whole_and_as_a_stream(server: str) -> None:
    whole, *events = output_of("curl.sh", server).strip().splitlines()
    assert json.loads(whole)["choices"][0]["message"]["content"] == ANSWER
    assert events[-2:] == ["data: [DONE]", ""] or events[-1] == "data: [DONE]"
    parts = [json.loads(line[6:]) for line in events if line.startswith("data: {")]
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == ANSWER


def test_every_example_is_run_and_listed() -> None:
    programs = {path.name for path in FOLDER.iterdir() if path.suffix in (".sh", ".py", ".mjs")}
    assert programs == {*SHOWN, "curl.sh", *ELSEWHERE}
    listed = re.findall(r"^\| \[([\w.]+)\]", (FOLDER / "README.md").read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(programs)


def test_the_first_program_that_a_reader_copies_runs(server: str, tmp_path: Path) -> None:
    text = (FOLDER.parent / "quickstart.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    program, hits = re.subn(r'api_key="\w+"', f'api_key="{KEY}"', program)
    assert hits == 1 and "http://127.0.0.1:8000" in program
    path = tmp_path / "program.py"
    path.write_text(program.replace("http://127.0.0.1:8000", server), encoding="utf-8")
    assert output_of(str(path), server).strip()


def test_the_first_command_that_a_reader_copies_runs(server: str) -> None:
    text = (FOLDER.parent / "quickstart.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    (curl .*?\n(?:        .*\n)*)", text, re.M)
    command = command.replace("http://127.0.0.1:8000", server)
    command += f" -s -H 'Authorization: Bearer {KEY}'"
    done = subprocess.run(
        ["sh", "-c", command.replace("\n ", " ")], capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == ANSWER, done.stderr
