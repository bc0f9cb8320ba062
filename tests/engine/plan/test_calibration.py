"""Test that measuring finds the step times of a worker whose times are known, and its file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigurationError
from quire.engine.plan import measuring
from quire.engine.plan.calibration import Calibration, load_calibration
from quire.engine.plan.front import FrontTimes
from quire.engine.plan.measuring import REPEATS, calibrate
from quire.engine.plan.planned_engine import PlannedForward, PlannedWorker, VirtualClock
from quire.engine.plan.serving import ServingTimes
from quire.engine.plan.step_times import StepTimes
from quire.engine.step import SchedulerOutput

from ..fleet.local_engine import LoadedWorker
from .models import TIMES


class TimedWorker(LoadedWorker):
    """A worker whose steps take the times of a model on a virtual clock. The first step of each
    shape takes ten times as long."""

    def __init__(self, clock: VirtualClock, times: StepTimes) -> None:
        super().__init__(num_blocks=300, block_size=16)
        self._planned = PlannedWorker(clock, times)
        self._clock = clock
        self._warm: set[str] = set()

    def forward(self, output: SchedulerOutput) -> PlannedForward:  # type: ignore[override]
        forward = self._planned.forward(output)
        shape = str(output.num_computed_starts) + str(output.num_new_tokens)
        if shape not in self._warm:
            self._warm.add(shape)
            self._planned._free_at += 1.0
            forward._end += 1.0
        return forward


def measure(runs_ahead: bool) -> Calibration:
    clock = VirtualClock()
    config = EngineConfig(
        model="none", max_num_seqs=16, speculation="off", async_scheduling=runs_ahead
    )
    return calibrate(config, TimedWorker(clock, TIMES), clock=lambda: clock.now)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_measuring_finds_the_times_of_a_worker(runs_ahead: bool) -> None:
    found = measure(runs_ahead)
    assert found.max_error < 1e-6 and len(found.points) > 20 and found.num_left == 0
    for name, seconds in asdict(TIMES).items():
        assert asdict(found.times)[name] == pytest.approx(seconds, rel=1e-3), name
    shape = found.shape
    assert (shape.num_blocks, shape.max_num_seqs, shape.runs_ahead) == (300, 16, runs_ahead)
    assert found.model == "none" and REPEATS > 3


def test_what_there_is_no_time_for_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MAX_SECONDS", 40.0)
    found = measure(runs_ahead=False)
    assert 0 < found.num_left < 20 and found.max_error < 1e-6
    assert any(point.shape.pairs for point in found.points)  # the chunks came first


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return measure(runs_ahead=False)


def test_the_file_is_read_as_it_was_written(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibration.save(path)
    assert load_calibration(path) == calibration
    served = replace(
        calibration,
        serving=ServingTimes(
            http=FrontTimes(request=1e-3, output=1e-4), client=FrontTimes(), stretch=1.1, error=0.1
        ),
    )
    served.save(path)
    assert load_calibration(path) == served
    assert served.served_times.base == pytest.approx(1.1 * served.times.base)
    assert calibration.served_times == calibration.times
    with pytest.raises(ConfigurationError, match="cannot write"):
        calibration.save(tmp_path / "no" / "file.json")


def change(**values: Any) -> Any:
    def apply(document: dict[str, Any]) -> Any:
        return {**document, **values}

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda document: [], "is no calibration: make one with quire plan --calibrate"),
        (lambda document: {"a": 1}, "is no calibration"),
        (change(version=0), "another version of quire"),
        (change(times={}), "is no calibration: 'base'"),
        (change(mean_error="x"), "mean_error is 'x'"),
        (lambda document: change(times={**document["times"], "row": -1})(document), "row is -1"),
        (lambda document: change(shape={**document["shape"], "num_blocks": 1.5})(document), "1.5"),
        (change(points=[[1, 2]]), "is no calibration"),
        (change(points=3), "is no calibration"),
        (change(messages={"step": -1.0, "request": 0.0}), "step is -1.0"),
        (change(serving={"http": {}}), "is no calibration"),
        (change(serving=3), "is no calibration"),
    ],
)
def test_broken_files_are_refused(
    calibration: Calibration, tmp_path: Path, edit: Any, message: str
) -> None:
    path = tmp_path / "calibration.json"
    calibration.save(path)
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ConfigurationError) as caught:
        load_calibration(path)
    assert message in caught.value.message and str(path) in caught.value.message


def test_files_that_are_missing_or_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        load_calibration(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigurationError, match="is not JSON"):
        load_calibration(tmp_path / "x.json")
