"""What a person sees of the start: short, within 80 columns, and with a command that works."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quire.server.serving.start_screen import MAX_LINES, show_loading, show_ready
from quire.server.settings import load_settings

from ..fakes import FakeEngineClient


def shown(address: str, *, colour: bool = False, **settings: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, highlight=False, soft_wrap=True, force_terminal=colour, width=80)
    values = load_settings(**settings)
    show_loading(console, values)
    show_ready(console, values, FakeEngineClient().info, address, 4.2)
    return out.getvalue()


def test_it_is_short_and_narrow() -> None:
    lines = shown("http://127.0.0.1:8000").splitlines()
    assert len(lines) <= MAX_LINES and max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for part in ("is ready after 4.2 s", "quire-demo", "1,024 tokens", "2.0 sequences of 512"):
        assert part in text
    assert "http://127.0.0.1:8000/v1" in text and "http://127.0.0.1:8000/docs" in text


@pytest.mark.parametrize(
    ("address", "settings", "url"),
    [
        ("http://127.0.0.1:8000", {}, "http://127.0.0.1:8000/v1/chat/completions"),
        ("http://h:1", {"root_path": "/a/"}, "http://h:1/a/v1/chat/completions"),
        ("unix:/x/q.sock", {"uds": "/x/q.sock"}, "http://quire/v1/chat/completions"),
    ],
)
def test_the_command_can_be_copied(address: str, settings: dict[str, Any], url: str) -> None:
    text = shown(address, **settings)
    command = shlex.split(text[text.index("curl ") :].replace("\\\n", ""))
    assert url in command and command[-1].startswith('{"messages"')
    assert ("--unix-socket" in command) == ("uds" in settings)


def test_a_key_is_asked_for_but_not_shown() -> None:
    text = shown("http://h:1", api_key="sesame")
    assert "$QUIRE_API_KEY" in text and "sesame" not in text


def test_colours_only_on_a_terminal_that_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[36m" in shown("http://h:1", colour=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in shown("http://h:1", colour=True)
    assert "\x1b" not in shown("http://h:1")
