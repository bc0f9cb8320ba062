"""One engine on a virtual clock: all of it is real but the device and the time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from ..cache.grouped_block_manager import make_block_manager
from ..core.step_loop import StepLoop
from ..events.block_events import BlockChanges
from ..grammar.constraints import NOTHING_PENDING
from ..outputs import EngineStats, SequenceOutput
from ..process import wire
from ..request import Request
from ..scheduling.scheduler import Scheduler
from ..step import ModelRunnerOutput, SamplingConstraints, SchedulerOutput
from ..worker_protocol import Results
from .step_times import StepShape, StepTimes

TOKEN = 1
"""The token that every row samples."""
MAX_EMPTY_STEPS = 1000
"""Steps without a row after which an engine is stuck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """The sizes of an engine that decide what it schedules."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    runs_ahead: bool
    can_generate: bool = True
    group_windows: tuple[int | None, ...] = (None,)
    """How many of the latest tokens each group of layers keeps; None for all."""

    @property
    def step_tokens(self) -> int:
        """Maximum number of tokens of the steps whose results have not arrived."""
        return self.max_num_batched_tokens * (1 + self.runs_ahead)


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageTimes:
    """What an engine's process takes for messages, in seconds: `step` between any two steps, and
    `request` more for each request that it reads there."""

    step: float = 0.0
    request: float = 0.0


class VirtualClock:
    """The present time of one engine, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0


class PlannedWorker:
    """A worker whose steps take the time of a model and sample a fixed token.

    The device runs steps one after the other. `forward` returns at once, and the results move the
    clock to the step's end.
    """

    def __init__(self, clock: VirtualClock, times: StepTimes) -> None:
        self._clock = clock
        self._times = times
        self._free_at = 0.0
        self._last: StepShape | None = None
        self.num_steps = 0
        self.busy_by_part: Counter[str] = Counter()
        """Seconds of the device by part of its steps."""

    def propose(self, scheduler_output: SchedulerOutput) -> dict[int, list[int]]:
        """Never called: a plan leaves drafts out."""
        raise NotImplementedError("a planned engine drafts nothing")

    def forward(self, scheduler_output: SchedulerOutput) -> PlannedForward:
        end = max(self._free_at, self._clock.now)
        if scheduler_output.seq_ids:
            self._last = StepShape.of(scheduler_output, self._last)
            parts = self._times.parts(self._last)
            self.busy_by_part.update(parts)
            end += sum(parts.values())
            self.num_steps += 1
        self._free_at = end
        return PlannedForward(self._clock, scheduler_output, end)


class PlannedForward:
    """A step that ends at a known time."""

    def __init__(self, clock: VirtualClock, plan: SchedulerOutput, end: float) -> None:
        self._clock = clock
        self._plan = plan
        self._end = end

    def sample(self, constraints: SamplingConstraints) -> Results:
        partial = set(self._plan.partial_rows)
        token_ids = [None if row in partial else TOKEN for row in range(len(self._plan.seq_ids))]

        def results() -> ModelRunnerOutput:
            self._clock.now = max(self._clock.now, self._end)
            return ModelRunnerOutput(token_ids, {}, {}, {}, {}, {}, {})

        return results


class PlannedEngine:
    """Takes requests at their times and steps. `follows_blocks` makes its messages carry what
    happens to its blocks."""

    def __init__(
        self,
        shape: EngineShape,
        times: StepTimes,
        messages: MessageTimes | None = None,
        *,
        follows_blocks: bool,
    ) -> None:
        self.shape = shape
        self._messages = messages or MessageTimes()
        self.clock = VirtualClock()
        self.worker = PlannedWorker(self.clock, times)
        self.manager = make_block_manager(shape.num_blocks, shape.block_size, shape.group_windows)
        self.manager.record_blocks(follows_blocks)
        self._scheduler = Scheduler(
            self.manager,
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            clock=self._read_clock,
        )
        self._loop = StepLoop(
            self._scheduler, self.worker, lambda rows: NOTHING_PENDING, run_ahead=shape.runs_ahead
        )
        self._inbox: deque[tuple[float, Request]] = deque()
        self._num_added = self._sequence = self._num_empty = 0
        self.peak_kv_usage = 0.0
        self.peak_waiting = 0
        self.full_steps = 0
        """Steps that used the whole token budget."""
        self.crowded_steps = 0
        """Steps in which as many sequences ran as may, while others waited."""
        self.starved_steps = 0
        """Steps in which sequences waited for blocks."""

    def _read_clock(self) -> float:
        return self.clock.now

    @property
    def next_step_at(self) -> float | None:
        """When the engine steps next; None while it has nothing to do."""
        if self._loop.has_work:
            return self.clock.now
        return max(self._inbox[0][0], self.clock.now) if self._inbox else None

    def send(self, request: Request, now: float) -> None:
        """Let a request arrive. It is read before the next step that begins after that."""
        self._inbox.append((now, request))

    def step(self, take: Callable[[SequenceOutput], None]) -> wire.StepMessage:
        """Run the step that is due, hand its outputs over, and return the message that clients get.
        They are there when the step has ended, which is what the clock shows then."""
        begin = self.next_step_at
        assert begin is not None
        self.clock.now = begin
        # 1. Read what has arrived. If the engine runs one step ahead, the device has a step to do
        #    meanwhile.
        seconds = self._messages.step
        while self._inbox and self._inbox[0][0] <= begin:
            self._scheduler.add_request(self._inbox.popleft()[1])
            self._num_added += 1
            seconds += self._messages.request
        self.clock.now += seconds
        if seconds and not self.shape.runs_ahead:
            self.worker.busy_by_part.update({"messages": seconds})
        # 2. The step.
        outputs = self._loop.step()
        for output in outputs:
            take(output)
        # 3. What is reported, and what is remembered for the plan.
        stats = self._scheduler.stats()
        self._remember(stats, bool(outputs))
        changes = None
        events = self.manager.take_block_events()
        if events:
            self._sequence += 1
            changes = BlockChanges.of(self._sequence, events)
        return wire.StepMessage([], stats, self._num_added, changes)

    def _remember(self, stats: EngineStats, has_outputs: bool) -> None:
        self.peak_kv_usage = max(self.peak_kv_usage, stats.kv_usage)
        self.peak_waiting = max(self.peak_waiting, stats.num_waiting)
        is_full = stats.step_tokens >= self.shape.max_num_batched_tokens
        self.full_steps += is_full
        if stats.num_waiting and stats.step_tokens:
            is_crowded = stats.num_running >= self.shape.max_num_seqs
            self.crowded_steps += is_crowded
            self.starved_steps += not (is_crowded or is_full)
        self._num_empty = 0 if stats.step_tokens or has_outputs else self._num_empty + 1
        if self._num_empty > MAX_EMPTY_STEPS:
            raise RuntimeError(f"the engine plans nothing although it has work: {stats}")

    @property
    def stats(self) -> EngineStats:
        """The engine's latest statistics."""
        return self._scheduler.stats()
