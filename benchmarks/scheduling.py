"""Host time of scheduler and block manager in a decode step, without a model.

    python -P benchmarks/scheduling.py

Every sequence decodes one token a step; all cross a block boundary in the same step, where full
blocks are hashed and indexed, so the mean (which includes it) is the honest figure.
"""

from __future__ import annotations

import gc
import statistics
import time

from quire.engine.block_manager import BlockManager
from quire.engine.outputs import ModelRunnerOutput
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams
from quire.engine.scheduler import Scheduler

BLOCK_SIZE, PROMPT, STEPS, WARM_UP = 16, 40, 320, 32


def measure(num_seqs: int) -> tuple[list[float], list[float]]:
    """Seconds of each step's schedule, and of its update."""
    scheduler = Scheduler(
        BlockManager(num_seqs * 32, BLOCK_SIZE),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * PROMPT,
    )
    for i in range(num_seqs):
        scheduler.add_request(
            Request(
                request_id=str(i),
                prompt_token_ids=tuple(range(i * 7, i * 7 + PROMPT)),
                sampling_params=SamplingParams(max_tokens=STEPS + WARM_UP + 2),
                arrival_time=0.0,
            )
        )
    gc.collect()
    gc.freeze()
    schedule: list[float] = []
    update: list[float] = []
    for _ in range(STEPS + WARM_UP):
        begin = time.perf_counter()
        scheduled = scheduler.schedule()
        middle = time.perf_counter()
        token_ids: list[int | None] = [5] * len(scheduled.sequences)
        result = ModelRunnerOutput(token_ids, {}, {}, {}, {})
        sampled = time.perf_counter()
        scheduler.update_from_output(scheduled, result)
        schedule.append(middle - begin)
        update.append(time.perf_counter() - sampled)
    return schedule[WARM_UP:], update[WARM_UP:]


def main() -> None:
    print("running | schedule µs (median) | update µs (median) | both µs (mean)")
    for num_seqs in (16, 64, 256, 512, 1024):
        schedule, update = measure(num_seqs)
        both = statistics.mean(schedule) + statistics.mean(update)
        print(
            f"{num_seqs:7} | {statistics.median(schedule) * 1e6:20.0f} "
            f"| {statistics.median(update) * 1e6:18.0f} | {both * 1e6:14.0f}"
        )


if __name__ == "__main__":
    main()
