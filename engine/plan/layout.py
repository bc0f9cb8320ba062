"""A fleet to plan: replicas of an engine, each on so many GPUs, with their step times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ..errors import ConfigurationError
from ..layers.layer_groups import longest_that_fits
from .calibration import Calibration
from .front import Front
from .planned_engine import EngineShape, MessageTimes
from .planned_fleet import FleetRun, PlannedFleet, PlannedRequest
from .roofline import EstimatedTimes, Gpu, ModelShape, check_tp, num_blocks
from .step_times import StepShape, StepTimes

Source = Literal["measured", "scaled", "estimated"]
"""Where step times come from: from this device; from it, divided among more GPUs by an estimate; or
from a table of GPUs."""


class Layout(NamedTuple):
    """So many replicas of an engine, each on `tp` GPUs."""

    tp: int
    replicas: int

    @property
    def gpus(self) -> int:
        """How many GPUs, or other devices, it takes."""
        return self.tp * self.replicas

    def __str__(self) -> str:
        return f"{self.tp} × {self.replicas}"

    @classmethod
    def read(cls, text: str) -> Layout:
        """Read TPxREPLICAS, such as 2x4. Raises ConfigurationError."""
        tp, _, replicas = text.lower().replace("×", "x").partition("x")
        if not (tp.strip().isdecimal() and replicas.strip().isdecimal()):
            raise ConfigurationError(f"a layout is TPxREPLICAS, such as 2x4, not {text!r}")
        if not (int(tp) and int(replicas)):
            raise ConfigurationError(f"a layout has at least one GPU and one replica, not {text!r}")
        return cls(int(tp), int(replicas))


def layouts_of(gpus: int, *, max_tp: int = 8) -> list[Layout]:
    """Return the layouts that use all of so many GPUs, by ascending tensor-parallel size."""
    sizes = [2**i for i in range(10) if 2**i <= min(gpus, max_tp)]
    return [Layout(tp, gpus // tp) for tp in sizes if gpus % tp == 0]


@dataclass(frozen=True, slots=True)
class ScaledTimes:
    """Measured step times of one GPU, divided among several, with estimated all-reduces."""

    measured: StepTimes
    estimated: EstimatedTimes

    def parts(self, shape: StepShape) -> dict[str, float]:
        tp = self.estimated.tp
        parts = {name: seconds / tp for name, seconds in self.measured.parts(shape).items()}
        return {**parts, "all-reduce": self.estimated.parts(shape)["all-reduce"]}


class PlannedEngineSpec(NamedTuple):
    """The sizes and step times of an engine on some GPUs, and where the times come from."""

    shape: EngineShape
    times: StepTimes
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What is known of the engine to plan: a calibration, a model and a kind of GPU, or all three.

    `shape` has the sizes that were asked for or measured; its number of blocks counts for one GPU,
    if `fixed_blocks` for any number of them.
    """

    shape: EngineShape
    calibration: Calibration | None = None
    model: ModelShape | None = None
    gpu: Gpu | None = None
    fixed_blocks: bool = False
    messages: MessageTimes = MessageTimes()

    def engine(self, tp: int) -> PlannedEngineSpec:
        """Return the engine on `tp` GPUs. Raises ConfigurationError if that is not possible, or if
        too little is known for it."""
        if self.calibration is not None and tp == 1:
            return PlannedEngineSpec(self.shape, self.calibration.served_times, "measured")
        if self.gpu is None or self.model is None:
            raise ConfigurationError(
                f"a tensor-parallel size of {tp} was not measured: give --gpu, to estimate it"
            )
        check_tp(self.model, tp)
        shape = self.shape
        if not self.fixed_blocks:
            blocks = num_blocks(self.model, self.gpu, tp, shape.block_size)
            fit = longest_that_fits(
                shape.group_windows,
                shape.block_size,
                blocks,
                shape.max_model_len,
                step_tokens=shape.step_tokens,
            )
            if fit < shape.max_model_len:
                raise ConfigurationError(
                    f"on {tp} GPU{'s' if tp > 1 else ''} the weights leave room for {fit} tokens, "
                    f"less than one context of {shape.max_model_len}: give --max-model-len or "
                    "more GPUs"
                )
            shape = replace(shape, num_blocks=blocks)
        estimated = EstimatedTimes(self.model, self.gpu, tp)
        if self.calibration is None:
            return PlannedEngineSpec(shape, estimated, "estimated")
        scaled = ScaledTimes(self.calibration.served_times, estimated)
        return PlannedEngineSpec(shape, scaled, "scaled")


WorkloadAt = Callable[[float], list[PlannedRequest]]
"""Makes the requests that arrive at a rate in requests/s."""


def runner(
    hardware: Hardware, layout: Layout, workload_at: WorkloadAt, front: Front
) -> Callable[[float], FleetRun]:
    """Return a function that runs the workload at a rate on a layout."""
    engine = hardware.engine(layout.tp)

    def run_at(rate: float) -> FleetRun:
        fleet = PlannedFleet(engine.shape, engine.times, layout.replicas, front, hardware.messages)
        return fleet.run(workload_at(rate))

    return run_at
