"""Measure how much of the KV memory holds live tokens, by block size and with reservations, and
what windows save.

    python -P benchmarks/memory.py

The real scheduler and block manager run without a model: every row samples token 1. Lengths are
lognormal (mean 200 in, 180 out) and 64 sequences run at once; prefix caching is on, but the prompts
have nothing in common. The result is exact and seeded and involves no time, so it does not depend
on the machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from quire.engine.cache.grouped_block_manager import make_block_manager
from quire.engine.layers.layer_groups import LayerGroups
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams
from quire.engine.scheduling.scheduler import Scheduler
from quire.engine.step import ModelRunnerOutput, SchedulerOutput

MEAN_INPUT, MEAN_OUTPUT, SIGMA = 200, 180, 0.8
MAX_MODEL_LEN = 4096
NUM_RUNNING, NUM_REQUESTS = 64, 1000
SHAPES: dict[str, list[int | None]] = {
    "gpt-oss 20b": [128, None] * 12,
    "Gemma 3 27B": [None if layer % 6 == 5 else 1024 for layer in range(62)],
    "Mistral 7B v0.1": [4096] * 32,
}
"""The windows of models' layers; None for layers that attend to all tokens."""
LONG = 32768


def lognormal(rng: random.Random, mean: float) -> int:
    """Draw a length with this mean."""
    value = rng.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)
    return max(1, min(int(value), MAX_MODEL_LEN // 2))


def make_scheduler(
    block_size: int,
    num_blocks: int,
    max_num_seqs: int,
    windows: tuple[int | None, ...] = (None,),
    budget: int = 8192,
) -> Scheduler:
    return Scheduler(
        make_block_manager(num_blocks, block_size, windows),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )


def run_step(scheduler: Scheduler) -> SchedulerOutput:
    """Run one step, in which every row that reaches its sequence's end samples token 1."""
    scheduled = scheduler.schedule()
    end_step(scheduler, scheduled)
    return scheduled


def end_step(scheduler: Scheduler, scheduled: SchedulerOutput) -> None:
    """Update the scheduler from the results of a step."""
    partial = set(scheduled.partial_rows)
    rows = range(len(scheduled.seq_ids))
    token_ids = [None if row in partial else 1 for row in rows]
    scheduler.update_from_output(scheduled, ModelRunnerOutput(token_ids, {}, {}, {}, {}, {}, {}))


def make_request(name: int, prompt: list[int], max_tokens: int, n: int = 1) -> Request:
    return Request(
        request_id=str(name),
        prompt_token_ids=tuple(prompt),
        sampling_params=SamplingParams(max_tokens=max_tokens, n=n),
        arrival_time=0.0,
    )


def workload(seed: int) -> Iterator[Request]:
    """Yield NUM_REQUESTS unrelated requests of lognormal lengths."""
    rng = random.Random(seed)
    for i in range(NUM_REQUESTS):
        prompt = [rng.randrange(32000) for _ in range(lognormal(rng, MEAN_INPUT))]
        yield make_request(i, prompt, lognormal(rng, MEAN_OUTPUT))


def used_blocks(scheduler: Scheduler) -> int:
    return scheduler.block_manager.pool.num_blocks - scheduler.block_manager.pool.num_free


def live_share(block_size: int) -> tuple[float, float]:
    """Return which share of the slots held by sequences holds computed tokens.

    The first number is for blocks, the second for a contiguous reservation of MAX_MODEL_LEN slots
    per sequence. Both are means over the steps with NUM_RUNNING sequences.
    """
    scheduler = make_scheduler(block_size, 131072 // block_size, NUM_RUNNING)
    for request in workload(seed=1):
        scheduler.add_request(request)
    paged: list[float] = []
    reserved: list[float] = []
    while scheduler.has_work:
        run_step(scheduler)
        if len(scheduler.running) == NUM_RUNNING:
            live = sum(sequence.num_computed_tokens for sequence in scheduler.running)
            paged.append(live / (used_blocks(scheduler) * block_size))
            reserved.append(live / (NUM_RUNNING * MAX_MODEL_LEN))
    return sum(paged) / len(paged), sum(reserved) / len(reserved)


def peak_blocks(scheduler: Scheduler) -> int:
    """Run to the end and return the largest number of blocks in use."""
    peak = 0
    while scheduler.has_work:
        run_step(scheduler)
        peak = max(peak, used_blocks(scheduler))
    return peak


def shared_prefix(block_size: int) -> tuple[int, int]:
    """Return the peak blocks of 32 requests that share 2,048 tokens, and those without sharing."""
    rng = random.Random(2)
    common = [rng.randrange(32000) for _ in range(2048)]
    suffixes = [[rng.randrange(32000) for _ in range(40)] for _ in range(32)]
    scheduler = make_scheduler(block_size, 131072 // block_size, 32)
    scheduler.add_request(make_request(0, common + suffixes[0], 100))
    run_step(scheduler)
    for i, suffix in enumerate(suffixes[1:], start=1):
        scheduler.add_request(make_request(i, common + suffix, 100))
    return peak_blocks(scheduler), 32 * math.ceil((2048 + 40 + 99) / block_size)


def parallel_sampling(block_size: int) -> tuple[int, int]:
    """Return the peak blocks of n = 8 (1,000 tokens in, 20 out), and those without sharing."""
    scheduler = make_scheduler(block_size, 65536 // block_size, 8)
    scheduler.add_request(make_request(0, list(range(1000)), 20, n=8))
    return peak_blocks(scheduler), 8 * math.ceil(1019 / block_size)


def windows_save(windows: list[int | None], budget: int) -> tuple[str, float, float]:
    """Run a sequence of LONG tokens, of which 128 are decoded, with steps of `budget` tokens.

    Returns the groups of the layers, and by which share their memory is less than that of one table
    for all layers: at the peak, and while tokens are decoded.
    """
    groups = LayerGroups.choose(windows, LONG, 16)
    scheduler = make_scheduler(16, 2**17, 1, groups.windows, budget)
    scheduler.add_request(make_request(0, list(range(LONG - 128)), 128))
    peak = decoding = 0
    while scheduler.has_work:
        scheduled = scheduler.schedule()
        used = used_blocks(scheduler)
        end_step(scheduler, scheduled)
        peak = max(peak, used)
        if not scheduled.partial_rows and scheduled.total_tokens == 1:
            decoding = max(decoding, used)
    one_table = len(windows) * LONG // 16
    kinds = "+".join(str(len(group.layers)) for group in groups.groups)
    saved = [1 - groups.num_places * blocks / one_table for blocks in (peak, decoding)]
    return f"{kinds} of {groups.num_places}", saved[0], saved[1]


def main() -> None:
    print(f"live tokens / held slots, {NUM_RUNNING} running, lognormal {MEAN_INPUT}/{MEAN_OUTPUT}")
    for block_size in (16, 32, 64, 128):
        paged, reserved = live_share(block_size)
        print(f"  block size {block_size:3}: {paged:6.1%}")
    print(f"  reserved to {MAX_MODEL_LEN}: {reserved:6.1%}")
    print("peak blocks, 32 requests sharing 2,048 tokens (100 out): held / without sharing")
    for block_size in (16, 32, 64, 128):
        held, unshared = shared_prefix(block_size)
        once = 2048 // block_size
        suffixes = 32 * math.ceil((40 + 99) / block_size)
        print(
            f"  block size {block_size:3}: {held} / {unshared}; "
            f"prompt once {once} + suffixes {suffixes} = {once + suffixes}"
        )
    print("peak blocks, n = 8 from 1,000 tokens (20 out): held / without sharing")
    for block_size in (16, 32, 64, 128):
        held, unshared = parallel_sampling(block_size)
        print(f"  block size {block_size:3}: {held} / {unshared}")
    print(f"memory of one sequence of {LONG:,} tokens against one table for all layers")
    for name, windows in SHAPES.items():
        for budget in (512, 2048, 8192):
            groups, peak, decoding = windows_save(windows, budget)
            print(
                f"  {name:15} layers {groups:22} {budget:5} tokens a step: "
                f"peak −{peak:.1%}, decoding −{decoding:.1%}"
            )


if __name__ == "__main__":
    main()
