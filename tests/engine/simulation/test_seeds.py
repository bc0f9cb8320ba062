"""Run a few seeds of the simulation; `make simulate` runs a thousand.

Any seed gives the same run again, in another process too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .simulate import summarise
from .world import SWARM, WINDOWS, Settings, run_seed

ROOT = Path(__file__).parents[3]


def test_some_seeds() -> None:
    reports = [run_seed(seed) for seed in range(17, 29)]
    assert [report.violation for report in reports] == [None] * len(reports)
    # What is to be survived has happened.
    total: Counter[str] = Counter()
    for report in reports:
        total += report.faults + report.counts + report.outcomes
        assert report.requests == 250
        assert report.longest_wait > 0
    for what in (
        "complete", "aborted", "client left", "error: engine_dead", "error: queue_timeout",
        "error: request_timeout", "error: non_finite_logits", "error: step_failed",
        "error: grammar_failed", "error: device_out_of_memory", "preemptions", "prefix_hits",
        "blocks_copied", "accepted_tokens", "engine: crash in a step",
        "engine: killed from outside", "engine: killed by the watchdog", "HTTP worker killed",
        "slow step", "late message",
        "repeated message", "junk on the socket", "adapter change", "disconnect",
        "out of memory by a large step", "out of memory by one request", "moves of requests",
        "moves in the midst of an answer", "moves on trial", "poison in a step", "engine given up",
        "loaded from host", "loaded from disk", "failures of disk",
    ):  # fmt: skip
        assert total[what], f"no world has any: {what}"


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(208, id="three beams, and no step of more than two tokens fits"),
        pytest.param(73, id="a failed step undoes states, with a request that never fits"),
        pytest.param(108, id="a failed step undoes states, and large steps never fit"),
    ],
)
def test_worlds_with_too_little_memory_go_on(seed: int) -> None:
    assert run_seed(seed).violation is None


def test_a_seed_replays_exactly() -> None:
    first, again, other = (run_seed(seed, 120) for seed in (5, 5, 6))
    assert first == again
    assert first.digest != other.digest
    # Python orders sets of strings differently in each process, unless it is told not to.
    code = "from tests.engine.simulation.world import run_seed; print(run_seed(5, 120).digest)"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        printed = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert printed.stdout.strip() == first.digest


def test_a_small_world_is_summarised(capsys: pytest.CaptureFixture[str]) -> None:
    assert summarise([run_seed(seed, 20) for seed in (1, 2)], 2) == 0
    printed = capsys.readouterr().out
    assert "40  requests" in printed and "2  seeds" in printed
    assert "other violations: 0" in printed


def test_worlds_differ_in_all_that_can_happen() -> None:
    drawn = [Settings.draw(seed, 1) for seed in range(60)]
    assert {kind for settings in drawn for kind in settings.swarm} == set(SWARM)
    assert {settings.policy for settings in drawn} == {"fcfs", "priority", "fair"}
    assert {settings.speculation for settings in drawn} == {"none", "random", "real"}
    assert {settings.run_ahead for settings in drawn} == {False, True}
    assert {settings.windows for settings in drawn} == set(WINDOWS)
