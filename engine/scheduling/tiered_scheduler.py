"""The scheduler of an engine that keeps evicted blocks outside of the device."""

from __future__ import annotations

from typing import Any

from ..outputs import EngineStats, SequenceOutput
from ..sequence import Sequence
from ..step import ModelRunnerOutput, SchedulerOutput
from ..tiers.block_tier import BlockTier
from ..tiers.readmission import Readmission
from .scheduler import Scheduler


class TieredScheduler(Scheduler):
    """Tells a tier of the beginning and the end of each step, and adds its copies to the plans.

    Blocks go to the tier where the pool reuses them (BlockPool.allocate), and come back where
    sequences are admitted (StepPlanner).
    """

    def __init__(self, *arguments: Any, tier: BlockTier, **options: Any) -> None:
        """The other arguments are those of Scheduler; the tier is that of its block manager."""
        super().__init__(*arguments, **options)
        self._tier = tier
        self._readmission = Readmission(self.block_manager, tier, self._clock)
        self._planner.readmission = self._readmission

    def schedule(self) -> SchedulerOutput:
        self._tier.begin_step(self._step + 1)
        return self._tier.complete(super().schedule())

    def update_from_output(
        self, output: SchedulerOutput, result: ModelRunnerOutput
    ) -> list[SequenceOutput]:
        self._tier.end_step(output)
        return super().update_from_output(output, result)

    def _release(self, sequence: Sequence, *, poisoned: bool = False) -> None:
        self._readmission.forget(sequence)
        super()._release(sequence, poisoned=poisoned)

    def stats(self) -> EngineStats:
        return super().stats()._replace(tiers=self._tier.stats())
