"""Compare `quire plan` with `quire bench serve`: the same requests at five rates, planned and
measured.

    python -P benchmarks/plan_accuracy.py

It calibrates the demo model on one CPU thread, starts a server with the same settings, measures
what HTTP adds to one request at a time, before its first token and between its tokens, and then
both plans and measures each rate, between a fifth and nine tenths of the planned capacity. What is
measured is the median of several runs, since those of one rate differ by more than the plan should.
The aim is that throughput and the median time to the first token differ by at most 10 %. Nothing
else should run on the machine: at least two cores, one for the engine and one for HTTP and the
client.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from quire.engine.plan.calibration import load_calibration
from quire.engine.plan.capacity import highest_rate
from quire.engine.plan.layout import Hardware, Layout, runner
from quire.engine.plan.planned_fleet import FleetRun, PlannedFleet, PlannedRequest
from quire.server.bench.dataset import DatasetOptions, arrival_times, build_workload

SHARES = (0.2, 0.4, 0.6, 0.8, 0.9)
"""Rates, as shares of the planned capacity."""
ENGINE = ("--num-threads", "1", "--num-gpu-blocks-override", "4000", "--max-num-seqs", "64")
LIMIT = 0.1
"""Difference of plan and measurement to keep below."""
QUIRE = (sys.executable, "-P", "-m", "quire.server.cli")
START_SECONDS = 120.0


def workload(
    options: argparse.Namespace, rate: float, count: int, seed: int
) -> list[PlannedRequest]:
    """Return the requests that `quire bench serve` sends at this rate with this seed."""
    made = build_workload(
        DatasetOptions(
            name="random",
            num_prompts=count,
            input_len=options.input_len,
            output_len=options.output_len,
            range_ratio=0.0,
            prefix_len=0,
            trace_file=None,
            vocab_size=options.vocab_size,
            seed=seed,
        )
    )
    arrivals = arrival_times(count, rate, 1.0, seed)
    return [
        PlannedRequest(arrival, request.prompt, request.output_len)  # type: ignore[arg-type]
        for arrival, request in zip(arrivals, made.requests, strict=True)
    ]


@contextmanager
def server(port: int) -> Iterator[str]:
    """Serve the demo model, and yield its address."""
    command = (*QUIRE, "serve", "--port", str(port), "--speculation", "off", *ENGINE)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{url}/ready", timeout=1)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the server does not start") from None
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def bench(
    options: argparse.Namespace, url: str, folder: Path, seed: int, *flags: str
) -> dict[str, Any]:
    """Run the benchmark and return its numbers. A seed's prompts are those of no other, so that a
    run finds nothing in the server's cache, as the plan does not."""
    path = folder / "result.json"
    command = (
        *(*QUIRE, "bench", "serve", "--base-url", url, "--result-filename", str(path)),
        *("--random-input-len", str(options.input_len)),
        *("--random-output-len", str(options.output_len), "--seed", str(seed), *flags),
    )
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result = json.loads(path.read_bytes())
    assert result["options"]["vocab_size"] == options.vocab_size
    (run,) = result["runs"]
    assert run["completed"] == run["num_requests"], run["errors"]
    found: dict[str, Any] = run
    return found


Numbers = tuple[float, ...]
"""Requests/s, output tokens/s, TTFT p50, ITL p50 and TTFT p99, the latencies in ms."""


def of_bench(run: dict[str, Any]) -> Numbers:
    ttft, itl = (run["latency_ms"][name]["percentiles"] for name in ("ttft", "itl"))
    return (
        *(run["requests_per_s"], run["output_tokens_per_s"]),
        *(ttft["p50"], itl["p50"], ttft["p99"]),
    )


def of_plan(run: FleetRun) -> Numbers:
    latencies = (run.percentile("ttft", 50), run.percentile("itl", 50), run.percentile("ttft", 99))
    return (run.requests_per_s, run.output_tokens_per_s, *(1e3 * one for one in latencies))


def compare(rate: float, measured: list[Numbers], planned: list[Numbers]) -> list[float]:
    """Print a line for one rate, of the medians of its runs, and return the differences that
    count."""
    medians = [map(median, zip(*runs, strict=True)) for runs in (measured, planned)]
    pairs = list(zip(*medians, strict=True))
    cells = [f"{real:8.1f} {plan:8.1f} {plan / real - 1:+6.1%}" for real, plan in pairs]
    print(f"{rate:6.1f} | " + " | ".join(cells), flush=True)
    return [abs(plan / real - 1) for real, plan in pairs[:3]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=300)
    parser.add_argument("--turns", type=int, default=3, help="runs of each rate")
    parser.add_argument("--port", type=int, default=18_377)
    parser.add_argument("--calibration", type=Path, help="measured before; default: measure now")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = options.calibration or folder / "calibration.json"
        if options.calibration is None:
            calibrate = (*QUIRE, "plan", "--calibrate", "--calibration", str(path), *ENGINE)
            subprocess.run(calibrate, check=True, stderr=subprocess.DEVNULL)
        calibration = load_calibration(path)
        options.vocab_size = calibration.shape.vocab_size
        with server(options.port) as url:
            # 1. What HTTP adds: requests one at a time, against the plan of one alone.
            alone = of_bench(
                bench(options, url, folder, 0, "--num-prompts", "30", "--max-concurrency", "1")
            )
            planned = of_plan(
                PlannedFleet(calibration.shape, calibration.times, 1).run(
                    workload(options, 1.0, 1, 0)
                )
            )
            between = max(alone[3] - planned[3], 0.0) / 1e3
            front = max(alone[2] - planned[2] - between, 0.0) / 1e3
            print(
                f"one at a time: TTFT {alone[2]:.1f} ms, of which HTTP {front * 1e3:.1f} ms; "
                f"ITL {alone[3]:.2f} ms, of which messages {between * 1e3:.2f} ms"
            )
            # 2. Each rate.
            hardware = Hardware(
                shape=calibration.shape, calibration=calibration, between_steps=between
            )

            def run_at(seed: int, rate: float) -> FleetRun:
                make = partial(workload, options, count=options.num_prompts, seed=seed)
                return runner(hardware, Layout(1, 1), make, front)(rate)

            capacity = highest_rate(partial(run_at, 1), (), 10.0).rate
            print(f"planned capacity {capacity:.1f} requests/s; measured, planned, difference:")
            heads = ("requests/s", "output tokens/s", "TTFT p50 ms", "ITL p50 ms", "TTFT p99 ms")
            print(f"{'rate':>6} | " + " | ".join(f"{head:>24}" for head in heads))
            differences: list[float] = []
            seeds = count(1)
            for rate in (share * capacity for share in SHARES):
                flags = ("--num-prompts", str(options.num_prompts), "--request-rate", str(rate))
                used = [next(seeds) for _ in range(options.turns)]
                measured = [of_bench(bench(options, url, folder, seed, *flags)) for seed in used]
                differences += compare(rate, measured, [of_plan(run_at(one, rate)) for one in used])
    worst = max(differences)
    print(f"throughput and TTFT p50 differ by at most {worst:.1%}; the aim is {LIMIT:.0%}")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
