"""The two benchmarks of the engine: `throughput` of many requests and `latency` of one batch."""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import statistics
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..core.engine_core import EngineCore
from ..errors import ConfigurationError
from .arguments import check_writable, engine_config
from .workload import RunResult, Workload, run_workload, uniform_lengths, write_profile


def run_throughput(arguments: argparse.Namespace) -> int:
    """Warm up, time a run, and with `--profile` repeat it under the profiler; return 0."""
    _check_range_ratio(arguments.random_range_ratio)
    check_writable(arguments.profile, arguments.output_json)
    core = _make_core(arguments)
    lengths = uniform_lengths(
        arguments.num_prompts,
        arguments.input_len,
        arguments.output_len,
        arguments.random_range_ratio,
        arguments.seed,
    )
    workload = _workload(arguments, lengths)
    # Few tokens but as many rows as the timed run, so that every batch size occurs once.
    warmup = Workload(
        tuple((min(prompt, 32), min(output, 8)) for prompt, output in lengths),
        workload.n,
        workload.temperature,
        workload.seed - 1,
    )
    run_workload(core, warmup)
    core.reset_prefix_cache()
    result = run_workload(core, workload)
    _print_result(core, result)
    if arguments.profile is not None:
        core.reset_prefix_cache()
        profile = cProfile.Profile()
        profile.enable()
        try:
            profiled = run_workload(core, workload)
        finally:
            profile.disable()
        write_profile(profile, profiled, arguments.profile)
        print(f"profile of a second run: {arguments.profile}")
    _save(arguments, core, asdict(result))
    return 0


def run_latency(arguments: argparse.Namespace) -> int:
    """Time one batch repeatedly, each time with other prompts, and print the median; return 0."""
    check_writable(arguments.output_json)
    core = _make_core(arguments)
    lengths = ((arguments.input_len, arguments.output_len),) * arguments.batch_size
    results = []
    for repetition in range(arguments.num_iters_warmup + arguments.num_iters):
        workload = _workload(arguments, lengths, seed_offset=repetition * arguments.batch_size)
        core.reset_prefix_cache()
        result = run_workload(core, workload)
        if repetition >= arguments.num_iters_warmup:
            results.append(result)
    seconds = sorted(result.elapsed_s for result in results)
    median = statistics.median(seconds)
    summary = {
        "latency_s_median": median,
        "latency_s_min": seconds[0],
        "latency_s_max": seconds[-1],
        "output_tokens_per_s": statistics.median(r.output_tokens_per_s for r in results),
        "step_ms_median": statistics.median(r.step_ms_median for r in results),
        "latencies_s": [result.elapsed_s for result in results],
    }
    _print_engine(core)
    print(
        f"batch of {arguments.batch_size}, {arguments.input_len} in, {arguments.output_len} out: "
        f"median {median * 1e3:.1f} ms (min {seconds[0] * 1e3:.1f}, max {seconds[-1] * 1e3:.1f}) "
        f"of {len(seconds)} repetitions\n"
        f"output tokens/s {summary['output_tokens_per_s']:.1f}, "
        f"median step {summary['step_ms_median']:.2f} ms"
    )
    _save(arguments, core, summary)
    return 0


def _check_range_ratio(ratio: float) -> None:
    if not 0.0 <= ratio < 1.0:
        raise ConfigurationError(f"--random-range-ratio must be from 0 to below 1, not {ratio}")


def _make_core(arguments: argparse.Namespace) -> EngineCore:
    # Imported late, so that a wrong command line is refused without the second that torch takes.
    from ..runner.worker import Worker

    config = engine_config(arguments)
    return EngineCore(config, Worker(config))


def _workload(
    arguments: argparse.Namespace, lengths: tuple[tuple[int, int], ...], seed_offset: int = 0
) -> Workload:
    temperature = arguments.temperature
    if temperature is None:
        temperature = 1.0 if arguments.n > 1 else 0.0
    return Workload(lengths, arguments.n, temperature, arguments.seed + seed_offset)


def _print_engine(core: EngineCore) -> None:
    info = core.info
    print(
        f"{info.architecture} on {info.device}, {info.dtype}, {info.num_parameters / 1e6:.1f} M "
        f"parameters, {info.num_blocks} blocks of {info.block_size} tokens"
    )


def _print_result(core: EngineCore, result: RunResult) -> None:
    _print_engine(core)
    print(
        f"{result.num_requests} requests, {result.prompt_tokens} prompt tokens "
        f"({result.cached_tokens} cached), {result.output_tokens} output tokens in "
        f"{result.elapsed_s:.2f} s\n"
        f"requests/s {result.requests_per_s:.2f}, output tokens/s "
        f"{result.output_tokens_per_s:.1f}, total tokens/s {result.total_tokens_per_s:.1f}\n"
        f"{result.num_steps} steps, median {result.step_ms_median:.2f} ms, p99 "
        f"{result.step_ms_p99:.2f} ms; {result.preemptions} preemptions, KV cache at most "
        f"{result.peak_kv_usage:.0%} used"
    )


def _save(arguments: argparse.Namespace, core: EngineCore, result: dict[str, Any]) -> None:
    if arguments.output_json is None:
        return
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if not callable(value)
    }
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": _versions(),
        "options": options,
        "engine": asdict(core.info),
        "result": result,
    }
    arguments.output_json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    """Return the versions in use. A source tree on the path, without an installation, has none."""
    found = {"python": platform.python_version()}
    for name in ("quire-server", "torch", "triton", "transformers"):
        try:
            found[name.removesuffix("-server")] = version(name)
        except PackageNotFoundError:
            found[name.removesuffix("-server")] = "not installed"
    return found
