"""What a server adds to its engine: fitted to runs of a real one.

    processor's seconds = request · N + prompt_token · P + message · S + output · O

in runs of N requests with P tokens of prompt, S steps and O tokens of output, for the HTTP process
and for the client by itself.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import numpy as np

from .front import Front, FrontTimes
from .planned_engine import EngineShape, MessageTimes
from .planned_fleet import PlannedFleet, PlannedRequest
from .step_times import FittedTimes, least_squares

STRETCHES = (0.7, 1.8)
"""Bounds within which `stretch` is looked for."""
HALVINGS = 10
LARGE_STRETCH = 1.3
"""A stretch above which something else must have used the machine."""


class ServedRun(NamedTuple):
    """A run against a server: its requests with their arrivals in seconds, the times to their first
    and last tokens, how many steps there were, and the seconds of processors that the HTTP process
    and the client took."""

    requests: list[PlannedRequest]
    ttft: list[float]
    e2e: list[float]
    num_steps: int
    http_seconds: float
    client_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTimes:
    """What the HTTP process and `quire bench serve` take for their jobs, and how many times as long
    the engine's steps take in a server as alone, where no other process uses memory and caches.

    `error` is the share by which the fit of the HTTP process's time is off, on average.
    """

    http: FrontTimes
    client: FrontTimes
    stretch: float
    error: float

    def front(self, *, with_client: bool) -> FrontTimes:
        """Return the times of an HTTP process, with those of a client on the same core or not."""
        return self.http + self.client if with_client else self.http


def fit_serving(
    alone: ServedRun,
    crowds: abc.Sequence[ServedRun],
    loads: abc.Sequence[ServedRun],
    shape: EngineShape,
    times: FittedTimes,
    messages: MessageTimes,
) -> ServingTimes:
    """Fit the times of a server.

    `alone` has requests that do not meet. `crowds` differ in the number of requests at once and in
    lengths, so that processors' seconds can be told apart; their arrivals do not matter. `loads`
    keep the engine busy for a part of the time, at known arrivals.
    """
    # 1. What each job takes of a processor.
    http, error = _fit_front(crowds, [run.http_seconds for run in crowds])
    client, _ = _fit_front(crowds, [run.client_seconds for run in crowds])

    def planned(run: ServedRun, stretch: float) -> PlannedFleet:
        front = Front(http + client)
        return PlannedFleet(shape, times.stretched(stretch), 1, front, messages)

    # 2. How long steps take: from the first to the last token nothing else counts. What else the
    #    machine does only makes a run longer, so the lower ones of several count.
    def stretch_of(run: ServedRun) -> float:
        low, high = STRETCHES
        measured = sum(run.e2e) - sum(run.ttft)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = planned(run, middle).run(run.requests)
            is_short = sum(found.e2e) - sum(found.ttft) < measured
            low, high = (middle, high) if is_short else (low, middle)
        return (low + high) / 2

    stretch = sorted(map(stretch_of, loads))[(len(loads) - 1) // 3]
    # 3. The rest of the time to a first token: network, and processes that wake up.
    rest = median(alone.ttft) - planned(alone, stretch).run(alone.requests).percentile("ttft", 50)
    http = replace(http, latency=max(rest, 0.0))
    return ServingTimes(http=http, client=client, stretch=stretch, error=error)


def _fit_front(runs: abc.Sequence[ServedRun], seconds: list[float]) -> tuple[FrontTimes, float]:
    """Return what each job takes, and the mean relative error."""
    target = np.array(seconds)
    columns = np.array(
        [
            (
                len(run.requests),
                sum(len(one.prompt) for one in run.requests),
                run.num_steps,
                sum(one.output_len for one in run.requests),
            )
            for run in runs
        ],
        dtype=float,
    )
    solution = least_squares(columns / target[:, None], np.ones(len(runs)))
    request, prompt_token, message, output = map(float, solution)
    error = float(np.abs(columns @ solution / target - 1).mean())
    times = FrontTimes(request=request, prompt_token=prompt_token, message=message, output=output)
    return times, error
