"""Requests that arrive at several engines on one virtual time, and their latencies."""

from __future__ import annotations

from collections import Counter, abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

import numpy as np

from ..errors import ConfigurationError, InvalidRequestError
from ..fleet.fleet_router import FleetRouter
from ..fleet.router import Choice
from ..outputs import SequenceOutput
from ..process import wire
from ..request import Request
from ..sampling_params import SamplingParams
from .front import Front, HttpProcess
from .planned_engine import EngineShape, MessageTimes, PlannedEngine
from .step_times import StepTimes

PILE_UP = 1.4
"""Growth of the open requests from one quarter of a run to another that is no chance."""


class PlannedRequest(NamedTuple):
    """A request: when it arrives, its prompt, the tokens of each of its n choices."""

    arrival: float
    prompt: abc.Sequence[int]
    output_len: int
    n: int = 1


@dataclass(slots=True)
class _Open:
    arrival: float
    http: HttpProcess
    num_choices: int
    choice: Choice = Choice("engine-0", 0)
    last: dict[int, float] = field(default_factory=dict)
    """When the latest token of each choice came."""
    num_ended: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRun:
    """What a run would have measured. Times are in seconds, `duration` from the first arrival to
    the last token."""

    open_at_arrival: list[int]
    """How many requests had not ended when each one arrived."""
    ttft: list[float]
    itl: list[float]
    e2e: list[float]
    queue: list[float]
    """From a request's arrival at its engine to its first step."""
    prefill: list[float]
    """From there to its first token, at the engine."""
    duration: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    wrongly_predicted_tokens: int
    preemptions: int
    num_steps: int
    peak_kv_usage: float
    full_steps: int
    crowded_steps: int
    starved_steps: int
    peak_waiting: int
    busy_share: float
    """Share of the time that an engine computes, on average."""
    busy_by_part: dict[str, float]
    """Share of the computing time by part of the steps."""
    front_busy_share: float
    """Share of the time that an HTTP process is busy, on average."""

    @property
    def piles_up(self) -> bool:
        """Whether ever more requests are open: in the last quarter of the arrivals clearly more
        than in the second. The first quarter only fills the engines."""
        quarter = len(self.open_at_arrival) // 4
        if not quarter:
            return False
        early = sum(self.open_at_arrival[quarter : 2 * quarter]) / quarter
        late = sum(self.open_at_arrival[-quarter:]) / quarter
        return late > PILE_UP * early + 1

    @property
    def requests_per_s(self) -> float:
        return len(self.e2e) / self.duration

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.duration

    def percentile(self, metric: str, percent: float) -> float:
        """Return a percentile of "ttft", "itl", "e2e", "queue" or "prefill" in seconds; 0 if there
        are no values."""
        values: list[float] = getattr(self, metric)
        return float(np.percentile(values, percent)) if values else 0.0


class PlannedFleet:
    """Runs a workload on `replicas` equal engines, behind the HTTP processes of a front.

    Requests go to the HTTP processes in turn. All that happens at known times, but the engines'
    steps, waits in one heap: arrivals, requests that reach their engine, and messages of steps.
    """

    def __init__(
        self,
        shape: EngineShape,
        times: StepTimes,
        replicas: int,
        front: Front | None = None,
        messages: MessageTimes | None = None,
    ) -> None:
        self._shape = shape
        self._times = times
        self._front = front or Front()
        self._messages = messages or MessageTimes()
        self._https = [HttpProcess() for _ in range(self._front.workers)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        """What happens when, with a number that keeps the order of what happens at once."""
        self._numbers = count()
        self._replicas = replicas
        self._engines: dict[str, PlannedEngine] = {}
        self._router: FleetRouter | None = None
        self._open: dict[str, _Open] = {}
        self._open_at_arrival: list[int] = []
        self._ttft: list[float] = []
        self._itl: list[float] = []
        self._e2e: list[float] = []
        self._queue: list[float] = []
        self._prefill: list[float] = []
        self._output_tokens = self._cached_tokens = 0

    def run(self, requests: abc.Sequence[PlannedRequest]) -> FleetRun:
        """Serve the requests, in the order of their arrivals, to the end.

        Raises ConfigurationError if one can never run on these engines.
        """
        for number, one in enumerate(requests):
            self._at(one.arrival, partial(self._arrive, self._make(number, one), number))
        self._start(requests)
        while True:
            due = [
                (at, name)
                for name, engine in self._engines.items()
                if (at := engine.next_step_at) is not None
            ]
            step_at, name = min(due, default=(float("inf"), ""))
            # An engine's step reads what has arrived until it begins, so that comes first.
            if self._events and self._events[0][0] <= step_at:
                now, _, happen = heappop(self._events)
                happen(now)
            elif due:
                self._step(name)
            else:
                break
        return self._summary(requests)

    def _at(self, time: float, happen: Callable[[float], None]) -> None:
        heappush(self._events, (time, next(self._numbers), happen))

    def _start(self, requests: abc.Sequence[PlannedRequest]) -> None:
        """Make the engines. Blocks that no request could ever want are left out of them: a pool of
        millions would take longer to make than the run."""
        size = self._shape.block_size
        wanted = sum(
            one.n * (-(-(len(one.prompt) + one.output_len) // size) + 1) for one in requests
        )
        wanted = wanted * len(self._shape.group_windows) + 1
        shape = replace(self._shape, num_blocks=min(self._shape.num_blocks, wanted))
        follows = self._replicas > 1
        for i in range(self._replicas):
            engine = PlannedEngine(shape, self._times, self._messages, follows_blocks=follows)
            self._engines[f"engine-{i}"] = engine
        if follows:
            self._router = FleetRouter()
            for name in self._engines:
                self._router.join(name, shape)
                self._router.observe(name, wire.BlocksKnown(0, b""))

    def _make(self, number: int, one: PlannedRequest) -> Request:
        try:
            request = Request(
                request_id=str(number),
                prompt_token_ids=tuple(one.prompt),
                sampling_params=SamplingParams(
                    max_tokens=one.output_len, n=one.n, ignore_eos=True, seed=0
                ),
                arrival_time=one.arrival,
            )
            request.check_fits(self._shape)
        except InvalidRequestError as error:
            raise ConfigurationError(f"request {number} of the workload: {error}") from error
        return request

    def _arrive(self, request: Request, number: int, now: float) -> None:
        """Let an HTTP process read a request that arrives `now`."""
        http = self._https[number % len(self._https)]
        self._open_at_arrival.append(len(self._open))
        self._open[request.request_id] = _Open(now, http, request.sampling_params.n)
        times = self._front.times
        seconds = times.request + times.prompt_token * len(request.prompt_token_ids)
        self._at(http.work(now, seconds) + times.latency, partial(self._route, request))

    def _route(self, request: Request, now: float) -> None:
        """Choose the engine of a request that an HTTP process has read, and send it there."""
        request = replace(request, arrival_time=now)
        if self._router is not None:
            hashes = self._router.hashes(request)
            choice = self._router.choose(request, hashes, now)
            self._router.sent(request, hashes, choice, now)
            request = replace(request, expected_cached_tokens=choice.predicted_cached_tokens)
            self._open[request.request_id].choice = choice
        self._engines[self._open[request.request_id].choice.engine].send(request, now)

    def _step(self, name: str) -> None:
        """Run an engine's step. Its message arrives when it ends."""
        engine = self._engines[name]
        outputs: list[SequenceOutput] = []
        message = engine.step(outputs.append)
        self._at(engine.clock.now, partial(self._receive, name, message, outputs))

    def _receive(
        self, name: str, message: wire.StepMessage, outputs: list[SequenceOutput], now: float
    ) -> None:
        """Let the HTTP processes handle the message of a step: each its own outputs."""
        if self._router is not None:
            self._router.observe(name, message)
        times = self._front.times
        for http in self._https:
            http.work(now, times.message)
        for output in outputs:
            http = self._open[output.request_id].http
            self._take(output, http.work(now, times.output))

    def _take(self, output: SequenceOutput, now: float) -> None:
        """Note the times of an output's tokens, which reach the client `now`."""
        request = self._open[output.request_id]
        num_tokens = len(output.token_ids)
        self._output_tokens += num_tokens
        if num_tokens:
            if not request.last:
                self._ttft.append(now - request.arrival)
            elif output.choice in request.last:
                self._itl.append(now - request.last[output.choice])
            self._itl.extend([0.0] * (num_tokens - 1))
            request.last[output.choice] = now
        if output.finish_reason is not None:
            request.num_ended += 1
            if output.choice == 0:
                timings = output.timings
                if timings is not None and timings.first_token is not None:
                    scheduled = timings.scheduled or 0.0
                    self._queue.append(scheduled)
                    self._prefill.append(timings.first_token - scheduled)
                cached = output.num_cached_tokens or 0
                self._cached_tokens += cached
                if self._router is not None:
                    self._router.compare(request.choice, cached)
            if request.num_ended == request.num_choices:
                self._e2e.append(now - request.arrival)
                del self._open[output.request_id]

    def _summary(self, requests: abc.Sequence[PlannedRequest]) -> FleetRun:
        engines = list(self._engines.values())
        begin = requests[0].arrival
        ends = [engine.clock.now for engine in engines]
        duration = max(*ends, *(http.free_at for http in self._https)) - begin
        busy: Counter[str] = sum((one.worker.busy_by_part for one in engines), Counter())
        total = busy.total()
        return FleetRun(
            open_at_arrival=self._open_at_arrival,
            ttft=self._ttft,
            itl=self._itl,
            e2e=self._e2e,
            queue=self._queue,
            prefill=self._prefill,
            duration=duration,
            output_tokens=self._output_tokens,
            prompt_tokens=sum(len(one.prompt) for one in requests),
            cached_tokens=self._cached_tokens,
            wrongly_predicted_tokens=self._router.wrong_tokens if self._router else 0,
            preemptions=sum(engine.stats.preemptions for engine in engines),
            num_steps=sum(engine.worker.num_steps for engine in engines),
            peak_kv_usage=max(one.peak_kv_usage for one in engines)
            * (engines[0].shape.num_blocks / self._shape.num_blocks),
            full_steps=sum(engine.full_steps for engine in engines),
            crowded_steps=sum(engine.crowded_steps for engine in engines),
            starved_steps=sum(engine.starved_steps for engine in engines),
            peak_waiting=max(engine.peak_waiting for engine in engines),
            busy_share=total / (duration * len(engines)),
            busy_by_part={part: seconds / total for part, seconds in busy.items()},
            front_busy_share=sum(http.busy for http in self._https) / (duration * len(self._https)),
        )
