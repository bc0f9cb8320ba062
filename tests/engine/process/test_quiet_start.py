"""On a terminal the log of the start is short, and nothing else is kept back."""

from __future__ import annotations

import logging

import pytest

from quire.engine.process.json_logs import QuietStart


@pytest.mark.parametrize("is_on", [True, False])
def test_only_what_the_start_tells_is_kept_back(is_on: bool) -> None:
    quiet = QuietStart(is_on)

    def passes(level: int) -> bool:
        return bool(quiet.filter(logging.LogRecord("x", level, "", 0, "", None, None)))

    assert passes(logging.INFO) is not is_on and passes(logging.WARNING)
    quiet.is_on = False  # the engine is ready
    assert passes(logging.INFO)
