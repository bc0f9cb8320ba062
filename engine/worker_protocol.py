"""The seam between the engine loop and the device: what a worker is, torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .config import WorkerInfo
from .outputs import ModelRunnerOutput, SchedulerOutput

Results = Callable[[], ModelRunnerOutput]
"""Waits for a launched step to end. Called once for each, in the order of their launch."""


class Launcher(Protocol):
    """What runs steps, in the order in which it is given them."""

    def launch(self, scheduler_output: SchedulerOutput) -> Results:
        """Begin a step; another may be launched before its results are asked for. A row whose
        token is UNKNOWN_TOKEN takes what the step before sampled for its sequence. If a row
        samples, `before_sampling` is called once, in which the results of the step before may be
        asked for and sequences may end; of these nothing but the tokens may be read from then on.

        Raises DeviceMemoryError where the device ran out; then nothing was sampled and the step
        may be tried again with fewer rows. Whatever else it or the results raise is a fault of the
        device or of the engine, not of a row.
        """


class WorkerProtocol(Launcher, Protocol):
    """Called in this order: `load`, `profile`, then `launch` once a step, from one thread."""

    def load(self) -> WorkerInfo:
        """Read the model onto the device. Raises StartupError."""

    def profile(self) -> int:
        """Allocate the KV cache; its number of blocks. Raises ConfigurationError if too small."""
