"""Schedule, launch, update: one step at a time, or one ahead of its results.

    one at a time      schedule 1 · launch 1 · update 1 · schedule 2 · launch 2 · update 2
    one ahead          schedule 1 · launch 1 · schedule 2 · launch 2 · update 1 · schedule 3 · …
                                    └─ the device runs 1 ─┘          └─ the device runs 2 ─┘

Ahead, the device need not wait for the host, which schedules a sequence's next token while the
last one is being sampled: that stands as UNKNOWN_TOKEN, and the worker feeds it back on the device.
A sequence that turns out to have ended has then been scheduled once too often; what that step
brought is dropped. Its blocks go back at once: steps run in the order of their launch, so whoever
gets them writes later. Blocks are indexed for sharing when results say that they are computed.

Where a row's sampling reads its tokens (grammars, bad words), the last results come in between the
launch of the forward, which needs no more than the device knows, and that of the sampling:

    schedule 2 · launch 2's forward · update 1 · masks of 2 · launch 2's sampling · schedule 3 · …

So nobody waits a step for anybody; the device waits only where the masks take longer than its
forward. (A row that is left out of every other step instead would get half as many tokens, and one
that all wait for would cost each step what the host does meanwhile.) Siblings that are about to
fork sit out until their prompt's results are in. Beams alone are waited for by all: the tokens that
they go on with are the host's choice. Penalties read the history that the device keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..errors import DeviceMemoryError
from ..outputs import SchedulerOutput, SequenceOutput
from ..scheduling.scheduler import Scheduler
from ..sequence import UNKNOWN_TOKEN
from ..worker_protocol import Launcher, Results

if TYPE_CHECKING:
    from ..grammar.masks import TokenMasks

logger = logging.getLogger("quire.engine")


class _Launched(NamedTuple):
    scheduled: SchedulerOutput
    results: Results


class StepLoop:
    """Scheduler and worker meet here only."""

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Launcher,
        *,
        run_ahead: bool,
        start_masks: Callable[[SchedulerOutput], TokenMasks | None] = lambda scheduled: None,
    ) -> None:
        """`start_masks` begins to fill the masks of a step's rows, from what they sampled."""
        self._scheduler = scheduler
        self._worker = worker
        self._run_ahead = run_ahead
        self._start_masks = start_masks
        self._in_flight: _Launched | None = None

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._in_flight is not None

    def step(self) -> list[SequenceOutput]:
        """Launch a step, and bring in the results of the last one, or of this one too where it
        must not stay in flight. A step that the device has no memory for is given up and its load
        reduced; the next call tries again."""
        outputs: list[SequenceOutput] = []
        if self._in_flight is not None and self._needs_results():
            outputs += self._bring_in()
        scheduled = self._scheduler.schedule()
        scheduled = scheduled._replace(before_sampling=self._before_sampling(scheduled, outputs))
        try:
            results = self._worker.launch(scheduled)
        except DeviceMemoryError as error:
            logger.warning("step %d: %s; trying again with less", scheduled.step, error.message)
            outputs += self._bring_in()
            self._scheduler.reduce_load()
            return outputs
        stays = self._run_ahead and bool(scheduled.sequences)
        if stays:
            _mark_in_flight(scheduled)
        outputs += self._bring_in()
        self._in_flight = _Launched(scheduled, results)
        return outputs if stays else outputs + self._bring_in()

    def _before_sampling(
        self, scheduled: SchedulerOutput, outputs: list[SequenceOutput]
    ) -> Callable[[], TokenMasks | None]:
        """Masks are begun at once where their rows' tokens are known, beside the forward."""
        reads = self._in_flight and any(one.reads_tokens for one in scheduled.sequences)
        if not reads:
            masks = self._start_masks(scheduled)
            return lambda: masks

        def bring_in_first() -> TokenMasks | None:
            outputs.extend(self._bring_in())
            return self._start_masks(scheduled)

        return bring_in_first

    def _needs_results(self) -> bool:
        """Whether the step in flight must come to its end before the next can be scheduled."""
        return any(one.is_beam for one in self._scheduler.running)

    def _bring_in(self) -> list[SequenceOutput]:
        """The results of the step in flight, if there is one."""
        if self._in_flight is None:
            return []
        (scheduled, results), self._in_flight = self._in_flight, None
        return self._scheduler.update_from_output(scheduled, results())


def _mark_in_flight(scheduled: SchedulerOutput) -> None:
    """A token that the step samples stands as UNKNOWN_TOKEN until its results are here, unless it
    will be its sequence's last one for its length, or a beam's."""
    rows = zip(
        scheduled.sequences, scheduled.num_computed_starts, scheduled.num_new_tokens, strict=True
    )
    for sequence, start, num_new in rows:
        sequence.num_in_flight += num_new
        end = start + num_new
        if (
            end == len(sequence.token_ids)
            and end + 1 < sequence.stop_at
            and not (sequence.is_beam or sequence.pooling)
        ):
            sequence.token_ids.append(UNKNOWN_TOKEN)
