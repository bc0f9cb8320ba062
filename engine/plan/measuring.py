"""Measures step times on a device: rows × context × chunk, in a minute or two.

Each episode is a few requests at once. It is run several times with other prompts of the same
lengths, so that its steps are the same, and the lower quartile of each step's times counts: what
else the machine does only ever adds to them.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count, product
from typing import Any, NamedTuple

from ..config import EngineConfig, EngineInfo
from ..core.engine_core import EngineCore
from ..errors import ConfigurationError
from ..layers.layer_groups import blocks_needed
from ..request import Request
from ..sampling_params import SamplingParams
from ..step import SchedulerOutput
from ..worker_protocol import Forward, WorkerProtocol
from .calibration import Calibration
from .message_times import measure_messages
from .planned_engine import EngineShape
from .step_times import Measured, StepShape, fit

REPEATS = 7
"""How often each episode is run and timed."""
DECODES = 6
"""Decode steps of an episode."""
LATE_STEPS = 3
"""Steps after which a late prompt arrives, beside decodes."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EVEN_ROWS = (1, 4, 16, 64, 256)
"""Rows that are measured with every context, the others with one of them."""
CONTEXTS = (16, 128, 512, 2048, 8192)
CHUNKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LATE_ROWS = (1, 4, 16)
LATE_CHUNKS = (32, 128, 400, 1600)
"""Rows that decode while a prompt of each length arrives."""
MESSAGE_ROUNDS = 40
MESSAGE_PROMPT = 128
"""Requests, each by itself, with which messages are measured, and their tokens of prompt."""
MAX_SECONDS = 120.0
"""After this long no further episode is begun."""

_numbers = count()


class Episode(NamedTuple):
    """Requests of these prompt lengths, all at once, with so many tokens of output; after
    LATE_STEPS steps comes a prompt of `late` tokens, if that is not 0."""

    prompts: tuple[int, ...]
    output_len: int
    late: int = 0


class RecordingWorker:
    """A worker that notes the shapes of the steps that it is given."""

    def __init__(self, worker: WorkerProtocol) -> None:
        self._worker = worker
        self.shapes: list[StepShape] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def forward(self, scheduler_output: SchedulerOutput) -> Forward:
        last = self.shapes[-1] if self.shapes else None
        self.shapes.append(StepShape.of(scheduler_output, last))
        return self._worker.forward(scheduler_output)


def episodes(info: EngineInfo) -> Iterator[Episode]:
    """Yield about 40 episodes that an engine can run: chunks of all lengths at several starts,
    chunks beside decodes, and decodes of many rows and contexts, the most rows last."""
    budget, longest = info.max_num_batched_tokens, info.max_model_len - DECODES - 1
    for length in CHUNKS:
        if length <= min(budget, longest) and _fits(info, 1, length):
            yield Episode((length,), 1)
    if _fits(info, 1, min(4 * budget, longest) + 1):
        yield Episode((min(4 * budget, longest),), 1)
    rows = min(16, info.max_num_seqs - 1)
    while rows > 0 and not _fits(info, rows, 300):
        rows -= 1
    if rows > 0 and budget // 2 <= longest:
        yield Episode((128,) * rows + (budget // 2,), DECODES)
    for rows, late in product(LATE_ROWS, LATE_CHUNKS):
        fits = rows < info.max_num_seqs and _fits(info, rows + 1, max(late, 300))
        if fits and late <= min(budget - rows, longest):
            yield Episode((128,) * rows, DECODES, late)
    for rows in ROWS:
        for context in CONTEXTS:
            fits = _fits(info, rows, context + DECODES)
            is_possible = rows <= info.max_num_seqs and context <= longest and fits
            is_quick = rows * context <= 8 * budget and (rows in EVEN_ROWS or context == 128)
            if is_possible and is_quick:
                yield Episode((context,) * rows, DECODES)


def _fits(info: EngineInfo, rows: int, num_tokens: int) -> bool:
    """Whether so many sequences take at most three quarters of the KV cache."""
    needed = blocks_needed(
        info.group_windows,
        info.block_size,
        num_tokens,
        width=rows,
        step_tokens=info.step_tokens,
    )
    return needed <= info.num_blocks * 3 // 4


def calibrate(
    config: EngineConfig,
    worker: WorkerProtocol,
    progress: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Measure the worker's step times in an engine of this configuration, and fit them.

    Raises StartupError if the model cannot be loaded, ConfigurationError if the engine is too small
    to be measured.
    """
    recording = RecordingWorker(worker)
    core = EngineCore(config, recording)
    info = core.info
    if not info.can_generate:
        raise ConfigurationError(f"{config.model} generates nothing that could be planned")
    if info.state_bytes:
        raise ConfigurationError(f"{config.model} has layers that keep a state; no plan knows them")
    runs_ahead = config.runs_ahead(info.is_asynchronous)
    times, num_left = _measure(core, recording, runs_ahead, progress, clock)
    points = tuple(
        Measured(shape, sorted(taken)[len(taken) // 4])
        for shape, taken in sorted(times.items())
        if len(taken) >= REPEATS
    )
    try:
        fitted = fit(points)
    except ValueError as error:
        raise ConfigurationError(f"the engine is too small to be calibrated: {error}") from error
    length = min(MESSAGE_PROMPT, info.max_model_len - DECODES)
    requests = [_request(core, length, DECODES) for _ in range(MESSAGE_ROUNDS)]
    return Calibration(
        model=config.model,
        device=info.device,
        dtype=info.dtype,
        quire=_version_of_quire(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        weight_bytes=info.weight_bytes,
        kv_bytes_per_token=info.kv_bytes_per_token,
        shape=_shape_of(info, runs_ahead),
        num_left=num_left,
        times=fitted.times,
        messages=measure_messages(core, requests, clock),
        serving=None,
        mean_error=fitted.mean_error,
        max_error=fitted.max_error,
        points=points,
    )


def _measure(
    core: EngineCore,
    recording: RecordingWorker,
    runs_ahead: bool,
    progress: Callable[[str], None],
    clock: Callable[[], float],
) -> tuple[dict[StepShape, list[float]], int]:
    """Run the episodes; return the seconds that steps of each shape took, and how many episodes
    there was no time for."""
    times: dict[StepShape, list[float]] = defaultdict(list)
    found = list(episodes(core.info))
    begin = clock()
    for index, episode in enumerate(found):
        if clock() - begin > MAX_SECONDS:
            return times, len(found) - index
        progress(f"{index + 1}/{len(found)}: {len(episode.prompts)} × {episode.prompts[-1]} tokens")
        for repeat in range(REPEATS + 1):
            steps = _run(core, recording, episode, runs_ahead, clock)
            if repeat:  # the first run compiles, and touches memory for the first time
                for shape, seconds in steps:
                    times[shape].append(seconds)
    return times, 0


def _shape_of(info: EngineInfo, runs_ahead: bool) -> EngineShape:
    return EngineShape(
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        runs_ahead=runs_ahead,
        group_windows=info.group_windows,
    )


def _run(
    core: EngineCore,
    recording: RecordingWorker,
    episode: Episode,
    runs_ahead: bool,
    clock: Callable[[], float],
) -> list[Measured]:
    """Run an episode with new prompts, and return its steps.

    One step ahead, a call waits for the step that the call before has launched; so its time is that
    step's, and the first call, which waits for nothing, has none.
    """
    core.reset_prefix_cache()
    for length in episode.prompts:
        _add(core, length, episode.output_len)
    recording.shapes.clear()
    taken: list[float] = []
    last = clock()
    while core.has_work:
        if episode.late and len(taken) == LATE_STEPS:
            _add(core, episode.late, episode.output_len)
            last = clock()
        core.step()
        now = clock()
        taken.append(now - last)
        last = now
    if runs_ahead:
        taken = taken[1:]
    steps = zip(recording.shapes, taken, strict=False)
    return [Measured(shape, seconds) for shape, seconds in steps if shape.rows]


def _add(core: EngineCore, length: int, output_len: int) -> None:
    core.add_request(_request(core, length, output_len))


def _request(core: EngineCore, length: int, output_len: int) -> Request:
    """Make a request with a prompt that no other has."""
    number = next(_numbers)
    vocab = range(core.info.vocab_size)
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    return Request(
        request_id=f"calibration-{number}",
        prompt_token_ids=tuple(random.Random(number).choices(vocab, k=length)),
        sampling_params=params,
        arrival_time=time.monotonic(),
    )


def _version_of_quire() -> str:
    try:
        return version("quire-server")
    except PackageNotFoundError:  # it runs from a source tree that is not installed
        return "unknown"
