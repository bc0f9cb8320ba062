"""The seam between the engine loop and the device: what a worker is, torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .config import WorkerInfo
from .lora import AdapterSource
from .step import ModelRunnerOutput, SamplingConstraints, SchedulerOutput

Results = Callable[[], ModelRunnerOutput]
"""Waits for a step to end and returns its results. Called once for each step, in order."""


class ReadAdapter(Protocol):
    """An adapter as the worker has read it; only the worker knows what else it is."""

    @property
    def version(self) -> str:
        """A hash of its files."""


class Forward(Protocol):
    """A step whose forward has begun on the device."""

    def sample(self, constraints: SamplingConstraints) -> Results:
        """Begin to sample the step's rows. Called once, after `Launcher.forward`.

        Raises DeviceMemoryError if the device runs out of memory; then nothing was sampled.
        """


class Launcher(Protocol):
    """Runs steps in the order in which it is given them."""

    def propose(self, scheduler_output: SchedulerOutput) -> dict[int, list[int]]:
        """Return the drafts that a plan leaves to the worker (`rows_to_propose`), by row. Called
        only for a plan with such rows, while no step is in flight and before its forward, which is
        then given what is left of the plan (`SchedulerOutput.with_proposals`).

        Raises DeviceMemoryError as `forward` does.
        """

    def forward(self, scheduler_output: SchedulerOutput) -> Forward:
        """Begin a step: block copies, then the model's forward, up to the logits.

        The next step may begin before this one's results are asked for. A row whose token is
        UNKNOWN_TOKEN takes the one that the step before sampled for its sequence.

        Raises DeviceMemoryError if the device runs out of memory; then the step may be tried again
        with fewer rows. The rest of the plan has been carried out by then, as no later plan repeats
        it: sequences released and introduced, tables changed, blocks copied. Anything else that
        this, the sampling or the results raise is a fault of the device or of the engine, not of a
        row.
        """


class WorkerProtocol(Launcher, Protocol):
    """A device with a model. `load`, `profile`, then `forward` once a step, from one thread."""

    def load(self) -> WorkerInfo:
        """Read the model onto the device. Raises StartupError."""

    def profile(self) -> int:
        """Allocate the KV cache and return its number of blocks.

        Raises ConfigurationError if it would be too small.
        """

    def max_num_seqs(self) -> int:
        """Return how many sequences may run: max_num_seqs of the configuration, or fewer if it may
        be lowered. Called after `profile`."""

    def block_bytes(self) -> int:
        """Return the bytes of a block in all caches. Called after `profile`."""

    def attach_host_memory(self, memory: memoryview) -> float:
        """Let plans save blocks to slots that fill `memory`, and load them from there. A slot has
        the bytes of a block in all caches. Returns the seconds of a block's copy. Called once,
        after `profile`, or not at all."""

    def copies_ended(self) -> int:
        """Return the last step of which it is known that its copies from and to host memory have
        ended, and those of all steps before. Never waits."""

    def read_adapter(self, source: AdapterSource) -> ReadAdapter:
        """Read a LoRA adapter without any effect on the worker. May be called in any thread.
        Raises InvalidRequestError if it cannot be read or does not fit the model."""

    def hold_adapter(self, adapter_id: int, adapter: Any) -> None:
        """Keep an adapter, for plans that name its id. (Those of `WorkerInfo.adapters` are kept
        from the start; their ids count from 0.)"""

    def drop_adapter(self, adapter_id: int) -> None:
        """Forget an adapter, which no later plan names."""
