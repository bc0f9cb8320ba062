"""Test how errors are shown in one line."""

from __future__ import annotations

from quire.engine.errors import MAX_LINE, one_line


def test_one_line_joins_lines_and_names_the_type_of_an_error() -> None:
    assert one_line("two\nlines,\t  joined ") == "two lines, joined"
    assert one_line(ValueError("bad\n  value")) == "ValueError: bad value"


def test_one_line_cuts_long_messages() -> None:
    assert one_line("x" * MAX_LINE) == "x" * MAX_LINE
    assert one_line("x" * (MAX_LINE + 1)) == "x" * MAX_LINE + " …"
