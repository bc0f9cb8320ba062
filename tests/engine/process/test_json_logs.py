"""Test the log in JSON format."""

from __future__ import annotations

import json
import logging
import sys

from quire.engine.process.json_logs import JsonFormatter


def test_each_record_is_one_object_on_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord(
            "quire.engine", logging.ERROR, "x.py", 1, "%s\nfailed", ("it",), sys.exc_info()
        )
    record.created = 1_000_000_000.25
    line = JsonFormatter({"source": "engine"}).format(record)
    assert "\n" not in line
    entry = json.loads(line)
    exception = entry.pop("exception")
    assert exception.startswith("Traceback") and exception.endswith("ValueError: two\nlines")
    assert entry == {
        "event": "it\nfailed",
        "source": "engine",
        "level": "error",
        "logger": "quire.engine",
        "timestamp": "2001-09-09T01:46:40.250000Z",
    }


def test_fields_of_a_record_are_entries() -> None:
    record = logging.LogRecord("quire", logging.INFO, "x.py", 1, "ran 100%", (), None)
    record.fields = {"status": 200, "path": "/ö", "error": ValueError("x")}
    line = JsonFormatter({}).format(record)
    assert line.startswith('{"status": 200, "path": "/ö", "error": "ValueError(\'x\')"')
    assert json.loads(line)["event"] == "ran 100%"
