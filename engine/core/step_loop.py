"""The step: schedule → forward → sample → update, one at a time or one ahead of its results.

    one at a time   schedule 1 · forward 1 · sample 1 · update 1 · schedule 2 · forward 2 · …

    one ahead       schedule 1 · forward 1 · sample 1 · schedule 2 · forward 2 · sample 2 · update 1
                                 └──── the device runs 1 ─────┘      └──── the device runs 2 ────…

One ahead, the device need not wait for the host, which schedules a sequence's next token while the
last one is being sampled: that one stands as UNKNOWN_TOKEN, and the worker feeds it back on the
device. A sequence that turns out to have ended has then been scheduled once too often; what that
step brought is dropped. Its blocks go back at once: steps run in the order of their launch, so
whoever gets the blocks writes to them later. Blocks are indexed for sharing when results say that
they are computed.

If the sampling of a row reads its tokens (grammars, bad words), the last results come in between
the forward, which needs no more than the device knows, and the sampling:

    schedule 2 · forward 2 · update 1 · constraints of 2 · sample 2 · schedule 3 · …

So no row waits a step for another; the device waits only if the constraints take longer than its
forward. (If such a row were left out of every other step instead, it would get half as many tokens;
if all rows waited for it, each step would cost what the host does in between.) Siblings that are
about to fork sit out until the results of their prompt have arrived. Only beams and drafts are
waited for by all: the host chooses the tokens that beams continue with, and a draft follows a known
token. A step with drafts does not stay in flight, since nobody knows how far they are right. The
drafts of a draft model come from the worker, between schedule and forward.
Penalties read the history that the device keeps.
"""

from __future__ import annotations

import logging
from collections import abc
from typing import NamedTuple

from ..errors import DeviceMemoryError
from ..grammar.constraints import PendingConstraints
from ..outputs import RowError, SequenceOutput
from ..scheduling.scheduler import Scheduler
from ..sequence import ReadingRow
from ..step import ModelRunnerOutput, SchedulerOutput
from ..worker_protocol import Launcher, Results

logger = logging.getLogger("quire.engine")


Constrain = abc.Callable[[list[ReadingRow]], PendingConstraints]
"""Begins to work out the constraints of rows whose sampling reads their tokens."""


class _Launched(NamedTuple):
    scheduled: SchedulerOutput
    results: Results
    errors: abc.Mapping[int, RowError]


class StepLoop:
    """Calls the verbs in order. Scheduler and worker meet only here, through a step's plan, its
    constraints and its results."""

    def __init__(
        self, scheduler: Scheduler, worker: Launcher, constrain: Constrain, *, run_ahead: bool
    ) -> None:
        self.on_begin: abc.Callable[[list[str]], None] | None = None
        """Called with the ids of requests that begin to be computed, before they are: if the step
        brings the process down, they are the suspects."""
        self._scheduler = scheduler
        self._worker = worker
        self._constrain = constrain
        self._run_ahead = run_ahead
        self._in_flight: _Launched | None = None

    @property
    def has_work(self) -> bool:
        """Whether anything is left to schedule or to bring in."""
        return self._scheduler.has_work or self._in_flight is not None

    def step(self) -> list[SequenceOutput]:
        """Launch a step and bring in the results of the one before, or of this one too if it must
        not stay in flight.

        A step that the device has no memory for is given up and its load reduced; the next call
        tries again.
        """
        scheduler = self._scheduler
        outputs: list[SequenceOutput] = []
        if self._in_flight is not None and scheduler.waits_for_results:
            outputs += self._bring_in()
        scheduled = scheduler.schedule()
        if scheduled.new_sequences and self.on_begin is not None:
            self.on_begin([spec.request_id for spec in scheduled.new_sequences])
        try:
            if scheduled.drafts and scheduled.rows_to_propose:
                scheduled = scheduler.with_drafts(scheduled, self._worker.propose(scheduled))
            reading = scheduler.rows_that_read(scheduled)
            if reading and self._in_flight is not None:
                forward = self._worker.forward(scheduled)  # the device is busy from here on
                outputs += self._bring_in()
                pending = self._constrain(reading)
            else:
                pending = self._constrain(reading)  # filled while the forward runs
                forward = self._worker.forward(scheduled)
            results = forward.sample(pending.wait())
        except DeviceMemoryError as error:
            logger.warning("step %d: %s; trying again with less", scheduled.step, error.message)
            outputs += self._bring_in()
            scheduler.reduce_load()
            return outputs
        stays = self._run_ahead and bool(scheduled.seq_ids) and not scheduled.drafts
        if stays:
            scheduler.mark_in_flight(scheduled)
        outputs += self._bring_in()
        self._in_flight = _Launched(scheduled, results, pending.errors)
        return outputs if stays else outputs + self._bring_in()

    def _bring_in(self) -> list[SequenceOutput]:
        """Update the scheduler from the results of the step in flight, if there is one."""
        if self._in_flight is None:
            return []
        (scheduled, results, errors), self._in_flight = self._in_flight, None
        result = results()
        return self._scheduler.update_from_output(
            scheduled, _fail_rows(result, errors) if errors else result
        )


def _fail_rows(result: ModelRunnerOutput, errors: abc.Mapping[int, RowError]) -> ModelRunnerOutput:
    """Return the result with these rows failed: whatever they sampled does not count."""
    token_ids = [None if row in errors else token for row, token in enumerate(result.token_ids)]
    return result._replace(token_ids=token_ids, errors={**result.errors, **errors})
