"""Run a folder of tests under Triton's interpreter, and report each of its files by name.

Triton reads TRITON_INTERPRET when it is first imported and compiles nothing from then on, so these
tests need a process of their own. One process runs a whole folder, because importing torch and
Triton takes seconds. Its report (JUnit's XML) then serves one test per file; if that test fails, it
shows the names and full tracebacks of the interpreted tests that failed.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
OPTIONS = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]


@dataclass(frozen=True)
class Outcome:
    """The result of one run of a folder."""

    passed: dict[str, int]
    """The number of tests that passed, by file name."""
    failures: dict[str, list[str]]
    """The name and traceback of each test that failed, by file name."""
    crash: str
    """The output of a process that failed without a failing test (it died, say); else empty."""


def interpreted_files(folder: Path) -> list[str]:
    """Return the names of the folder's test files, in the order in which they run."""
    return sorted(path.name for path in folder.glob("test_*.py"))


def require_passed(folder: Path, name: str) -> None:
    """Fail the calling test unless every test of the file `name` in `folder` passes.

    The first call runs the whole folder.
    """
    outcome = _run(folder)
    if failures := outcome.failures.get(name):
        pytest.fail("\n\n".join([f"{len(failures)} failed in {name}", *failures]), pytrace=False)
    if outcome.crash or not outcome.passed.get(name):
        pytest.fail(f"no test of {name} passed\n\n{outcome.crash}", pytrace=False)


@functools.cache
def _run(folder: Path) -> Outcome:
    """Run the folder's tests in a new process with the interpreter switched on."""
    passed: dict[str, int] = {}
    failures: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-P", "-m", "pytest", *OPTIONS, str(folder)]
        command += [f"--junitxml={report}", "--override-ini=junit_family=xunit1"]
        done = subprocess.run(
            command,
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        for case in cases:
            name = Path(case.attrib["file"]).name
            problems = [*case.findall("failure"), *case.findall("error")]
            for problem in problems:
                failures.setdefault(name, []).append(f"{case.attrib['name']}\n{problem.text}")
            if not problems and case.find("skipped") is None:
                passed[name] = passed.get(name, 0) + 1
    explained = done.returncode == 0 or failures
    return Outcome(passed, failures, "" if explained else done.stdout + done.stderr)
