"""The file that `quire plan --calibrate` writes: an engine's measured step times, and its sizes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import ConfigurationError
from .front import FrontTimes
from .planned_engine import EngineShape, MessageTimes
from .serving import ServingTimes
from .step_times import FittedTimes, Measured, StepShape

VERSION = 3
"""The file's format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Step times of one model on one device, with the shape of the engine that was measured, what
    its messages take, and what a server adds; None if no server was measured.

    `mean_error` and `max_error` say by which share of the measured times the fit is off. `num_left`
    counts the steps of many rows that there was no time to measure.
    """

    model: str
    device: str
    dtype: str
    quire: str
    date: str
    weight_bytes: int
    kv_bytes_per_token: int
    shape: EngineShape
    times: FittedTimes
    messages: MessageTimes
    serving: ServingTimes | None
    mean_error: float
    max_error: float
    num_left: int
    points: tuple[Measured, ...]

    @property
    def served_times(self) -> FittedTimes:
        """The step times in a server, or alone if no server was measured."""
        return self.times if self.serving is None else self.times.stretched(self.serving.stretch)

    def save(self, path: Path) -> None:
        """Write the file. Raises ConfigurationError if that fails."""
        document = {"version": VERSION, **asdict(self)}
        document["points"] = [[*point.shape, point.seconds] for point in self.points]
        try:
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error


def load_calibration(path: Path) -> Calibration:
    """Read a calibration. Raises ConfigurationError if the file is not one."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or "version" not in document:
        raise ConfigurationError(f"{path} is no calibration: make one with quire plan --calibrate")
    if document.pop("version") != VERSION:
        raise ConfigurationError(f"{path} was written by another version of quire: calibrate again")
    try:
        shape = document["shape"]
        windows = shape["group_windows"] = tuple(shape["group_windows"])
        if not windows or not all(
            one is None or (type(one) is int and one != 0) for one in windows
        ):
            raise ValueError(f"group_windows is {windows!r}")
        document["shape"] = _read(EngineShape, shape)
        document["times"] = _read(FittedTimes, document["times"])
        document["messages"] = _read(MessageTimes, document["messages"])
        serving = document["serving"]
        if serving is not None:
            for name in ("http", "client"):
                serving[name] = _read(FrontTimes, serving[name])
            document["serving"] = _read(ServingTimes, serving)
        document["points"] = tuple(
            Measured(StepShape(*map(int, point[:-1])), float(point[-1]))
            for point in document["points"]
        )
        calibration: Calibration = _read(Calibration, document)
        return calibration
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigurationError(f"{path} is no calibration: {error}") from error


def _read(kind: type[Any], values: dict[str, Any]) -> Any:
    """Make a dataclass of plain values. Raises TypeError or ValueError."""
    types = get_type_hints(kind)
    for item in fields(kind):
        value, wanted = values[item.name], types[item.name]
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = values[item.name] = float(value)
        if wanted in (int, float, str, bool) and type(value) is not wanted:
            raise TypeError(f"{item.name} is {value!r}")
        if wanted in (int, float) and not value >= 0:
            raise ValueError(f"{item.name} is {value!r}")
    return kind(**values)
