"""The server's log: entries of structlog and of the standard library, in both formats."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from quire.engine.process.json_logs import LIBRARIES, LogFormat, take_over_libraries
from quire.server.logs import configure_logging, resolve_format


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


def write(log_format: LogFormat, capsys: pytest.CaptureFixture[str], **worker: int) -> list[str]:
    """Configure the log, write three entries, and return the lines on stderr."""
    configure_logging("info", log_format, **worker)
    log = structlog.get_logger("quire.server.test")
    log.info("request %s", "done", status=200, path="/ö")
    log.debug("not logged")
    logging.getLogger("library").warning("%d%% used", 90)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed", at=1)
    return capsys.readouterr().err.splitlines()


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [json.loads(line) for line in write("json", capsys)]
    assert all(entry.pop("timestamp").endswith("Z") for entry in entries)
    assert entries[2].pop("exception").endswith("ValueError: two\nlines")
    server = {"logger": "quire.server.test"}
    assert entries == [
        {"event": "request done", "level": "info", "status": 200, "path": "/ö", **server},
        {"event": "90% used", "level": "warning", "logger": "library"},
        {"event": "failed", "level": "error", "at": 1, **server},
    ]


def test_console_lines_have_the_same_content(capsys: pytest.CaptureFixture[str]) -> None:
    lines = write("console", capsys)
    assert "[info] request done [quire.server.test] path=/ö status=200" in lines[0]
    assert "[warning] 90% used [library]" in lines[1]
    assert "[error] failed [quire.server.test] at=1" in lines[2]
    assert lines[-1] == "lines"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_one_of_several_workers_names_itself(
    log_format: LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write(log_format, capsys, worker=3)
    mark = '"worker": 3' if log_format == "json" else "worker=3"
    assert sum(mark in line for line in lines) == 3


def test_auto_is_json_unless_on_a_terminal() -> None:
    assert resolve_format("auto") == "json"
    assert resolve_format("console") == "console"


def test_libraries_write_one_line_in_our_format(capsys: pytest.CaptureFixture[str]) -> None:
    import transformers  # noqa: F401  adds handlers of its own, for huggingface_hub too

    configure_logging("info", "json")
    take_over_libraries()
    for name in LIBRARIES:
        logging.getLogger(f"{name}.models").warning("look out")
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line)["logger"] for line in lines] == [
        f"{name}.models" for name in LIBRARIES
    ]
