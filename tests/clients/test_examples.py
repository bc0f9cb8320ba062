"""The examples of the documents that need nothing but curl and the `openai` package."""

from __future__ import annotations

import json
import re

import pytest

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
