"""A workload for the engine alone and its measurement: random prompts, outputs of fixed length."""

from __future__ import annotations

import cProfile
import pstats
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from ..core.engine_core import EngineCore
from ..errors import error_from_code
from ..request import Request
from ..sampling_params import SamplingParams

PROFILE_ROWS = 60
"""Functions listed in each table of a profile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Measurements of one workload, from its first step to its last.

    Times are in seconds unless the name says otherwise. Output tokens are those that the engine
    reported, of all n choices.
    """

    elapsed_s: float
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    num_steps: int
    step_ms_median: float
    step_ms_p99: float
    preemptions: int
    peak_kv_usage: float


@dataclass(frozen=True, slots=True)
class Workload:
    """The (prompt, output) lengths of each request in tokens, and the sampling parameters."""

    lengths: tuple[tuple[int, int], ...]
    n: int
    temperature: float
    seed: int

    def requests(self, vocab_size: int) -> list[Request]:
        """Return the same requests every time, with prompts of random token ids."""
        rng = random.Random(self.seed)
        return [
            Request(
                request_id=f"bench-{index}",
                prompt_token_ids=tuple(rng.choices(range(vocab_size), k=prompt)),
                sampling_params=SamplingParams(
                    max_tokens=output,
                    n=self.n,
                    temperature=self.temperature,
                    seed=self.seed + index,
                    ignore_eos=True,
                ),
                arrival_time=time.monotonic(),
            )
            for index, (prompt, output) in enumerate(self.lengths)
        ]


def uniform_lengths(
    count: int, prompt: int, output: int, range_ratio: float, seed: int
) -> tuple[tuple[int, int], ...]:
    """Draw `count` pairs, each length uniform in [length · (1 − ratio), length · (1 + ratio)]."""
    rng = random.Random(seed)

    def draw(length: int) -> int:
        return max(
            1, rng.randint(round(length * (1 - range_ratio)), round(length * (1 + range_ratio)))
        )

    return tuple((draw(prompt), draw(output)) for _ in range(count))


def run_workload(core: EngineCore, workload: Workload) -> RunResult:
    """Queue all requests and step until none is left. Raises the error of the first that fails."""
    requests = workload.requests(core.info.vocab_size)
    preemptions = core.stats().preemptions
    for request in requests:
        core.add_request(request)
    output_tokens = cached_tokens = 0
    peak = 0.0
    steps: list[float] = []
    begin = last = time.perf_counter()
    while core.has_work:
        step = core.step()
        for output in step.outputs:
            if output.error is not None:
                raise error_from_code(output.error.code, output.error.message)
            output_tokens += len(output.token_ids)
            if (
                output.choice == 0 and output.finish_reason is not None
            ):  # every output of a request reports it
                cached_tokens += output.num_cached_tokens or 0
        peak = max(peak, step.stats.kv_usage)
        now = time.perf_counter()
        steps.append(now - last)
        last = now
    elapsed = last - begin
    prompt_tokens = sum(prompt for prompt, _ in workload.lengths)
    steps.sort()
    return RunResult(
        elapsed_s=elapsed,
        num_requests=len(requests),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        cached_tokens=cached_tokens,
        requests_per_s=len(requests) / elapsed,
        output_tokens_per_s=output_tokens / elapsed,
        total_tokens_per_s=(prompt_tokens + output_tokens) / elapsed,
        num_steps=len(steps),
        step_ms_median=statistics.median(steps) * 1e3,
        step_ms_p99=steps[min(len(steps) - 1, int(0.99 * len(steps)))] * 1e3,
        preemptions=core.stats().preemptions - preemptions,
        peak_kv_usage=peak,
    )


def write_profile(profile: cProfile.Profile, result: RunResult, path: Path) -> None:
    """Write the host's time by function, sorted by cumulative and then by own time.

    The first line has the number of steps to divide by. On a GPU, the functions that wait for the
    device show where the host synchronises.
    """
    with path.open("w", encoding="utf-8") as file:
        file.write(
            f"{result.num_steps} steps in {result.elapsed_s:.3f} s with the profiler on, "
            f"median {result.step_ms_median:.3f} ms a step\n\n"
        )
        stats = pstats.Stats(profile, stream=file)
        for order in ("cumulative", "tottime"):
            stats.sort_stats(order).print_stats(PROFILE_ROWS)
