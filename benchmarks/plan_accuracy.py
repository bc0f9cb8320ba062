"""Compare `quire plan` with `quire bench serve`: the same requests at five rates, planned and
measured.

    python -P benchmarks/plan_accuracy.py

It calibrates the demo model on one CPU thread and what HTTP and the client take (`quire plan
--calibrate`), starts a server with the same settings, and then both plans and measures each rate,
between a fifth and nine tenths of the planned capacity. The client shares HTTP's core, so it is
planned, too (--with-client). What is measured is the median of several turns over all rates, since
runs of one rate differ by more than the plan should. The aim is that throughput and the median time
to the first token differ by at most 10 %. A second table says of the last run of each rate what
these are made of, and so where a difference comes from. Nothing else should run on the machine: at
least two cores, one for the engine and one for HTTP and the client.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil

from quire.engine.plan.calibration import load_calibration
from quire.engine.plan.capacity import highest_rate
from quire.engine.plan.front import Front
from quire.engine.plan.layout import Hardware, Layout, runner
from quire.engine.plan.planned_fleet import FleetRun, PlannedRequest
from quire.server.bench.dataset import DatasetOptions, arrival_times, build_workload
from quire.server.bench.plan_report import describe_calibration

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
            vocab_size=options.vocab_size,
            seed=seed,
        )
    )
    arrivals = arrival_times(count, rate, 1.0, seed)
    return [
        PlannedRequest(arrival, request.prompt, request.output_len)  # type: ignore[arg-type]
        for arrival, request in zip(arrivals, made.requests, strict=True)
    ]


COUNTED = {
    "steps": "iteration_tokens_total_count",
    "queue": "request_queue_time_seconds_sum",
    "prefill": "request_prefill_time_seconds_sum",
    "hits": "prefix_cache_hits_total",
}
"""Sums that the server's metrics have, by the ends of their names."""


class Server(NamedTuple):
    """A running server: its address, its HTTP process and its engine's."""

    url: str
    http: psutil.Process
    engine: psutil.Process

    def usage(self) -> dict[str, float]:
        """Return what has been used and counted so far: seconds of processors, and COUNTED."""
        found = {
            name: sum(process.cpu_times()[:2])
            for name, process in (("http", self.http), ("engine", self.engine))
        }
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for name, end in COUNTED.items():
            values = re.findall(rf"^\w+:{end}(?:{{[^}}]*}})? (\S+)$", text, re.M)
            found[name] = float(values[0]) if values else 0.0
        return found


@contextmanager
def server(port: int) -> Iterator[Server]:
    """Serve the demo model."""
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
        http = psutil.Process(process.pid)
        (engine,) = [one for one in http.children() if "engine_process" in " ".join(one.cmdline())]
        yield Server(url, http, engine)
    finally:
        process.terminate()
        process.wait()


def bench(
    options: argparse.Namespace, server: Server, folder: Path, seed: int, *flags: str
) -> dict[str, Any]:
    """Run the benchmark and return its numbers, with what the server `used` meanwhile. A seed's
    prompts are those of no other, so that a run finds nothing in the server's cache, as the plan
    does not."""
    path = folder / "result.json"
    command = (
        *(*QUIRE, "bench", "serve", "--base-url", server.url, "--result-filename", str(path)),
        *("--random-input-len", str(options.input_len), "--num-warmups", "0"),
        *("--random-output-len", str(options.output_len), "--seed", str(seed), *flags),
    )
    before = server.usage()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    used = {name: after - before[name] for name, after in server.usage().items()}
    result = json.loads(path.read_bytes())
    assert result["options"]["vocab_size"] == options.vocab_size
    (run,) = result["runs"]
    assert run["completed"] == run["num_requests"], run["errors"]
    found: dict[str, Any] = run | {"used": used}
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


def explain(rate: float, run: dict[str, Any], planned: FleetRun) -> None:
    """Print the parts of a first token's time (means), and what they are made of."""
    used, count = run["used"], run["num_requests"]

    def mean(values: list[float]) -> float:
        return 1e3 * sum(values) / len(values)

    queue, prefill = (1e3 * used[name] / count for name in ("queue", "prefill"))
    outside = run["latency_ms"]["ttft"]["mean"] - queue - prefill
    busy = planned.busy_share * planned.duration
    pairs = (
        (queue, mean(planned.queue)),
        (prefill, mean(planned.prefill)),
        (outside, mean(planned.ttft) - mean(planned.queue) - mean(planned.prefill)),
        (used["steps"], planned.num_steps),
        (1e3 * used["engine"] / used["steps"], 1e3 * busy / planned.num_steps),
        (used["engine"] / run["duration_s"], planned.busy_share),
        (used["hits"], planned.cached_tokens),
    )
    cells = [f"{real:9.2f} {plan:9.2f}" for real, plan in pairs]
    print(f"{rate:6.1f} | " + " | ".join(cells), flush=True)


PARTS = ("queue ms", "first step ms", "HTTP, client ms", "steps", "ms a step", "engine busy")
PARTS += ("cached tokens",)
"""The columns of `explain`. A step's time is that of the engine's processor."""


def compare(rate: float, measured: list[Numbers], planned: list[Numbers]) -> list[float]:
    """Print a line for one rate, of the medians of its runs, and return the differences that
    count."""
    medians = [map(median, zip(*runs, strict=True)) for runs in (measured, planned)]
    pairs = list(zip(*medians, strict=True))
    cells = [f"{real:8.1f} {plan:8.1f} {plan / real - 1:+6.1%}" for real, plan in pairs]
    print(f"{rate:6.1f} | " + " | ".join(cells), flush=True)
    for real, plan in zip(measured, planned, strict=True):
        print(
            f"{'':>6} | TTFT p50 of a run {real[2]:.1f} {plan[2]:.1f} {plan[2] / real[2] - 1:+.1%}"
        )
    return [abs(plan / real - 1) for real, plan in pairs[:3]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a run")
    parser.add_argument("--num-prompts", type=int, default=300, help="requests of the longest run")
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
        assert calibration.serving is not None, "the calibration has no --http"
        print(describe_calibration(calibration))
        front = Front(calibration.serving.front(with_client=True))
        hardware = Hardware(
            shape=calibration.shape, calibration=calibration, messages=calibration.messages
        )

        def run_at(seed: int, count: int, rate: float) -> FleetRun:
            make = partial(workload, options, count=count, seed=seed)
            return runner(hardware, Layout(1, 1), make, front)(rate)

        capacity = highest_rate(partial(run_at, 1, options.num_prompts), (), 10.0).rate
        rates = [share * capacity for share in SHARES]
        runs: dict[float, list[tuple[dict[str, Any], FleetRun]]] = {rate: [] for rate in rates}
        with server(options.port) as serving:
            seeds = count(1)
            bench(options, serving, folder, 0, "--num-prompts", "20", "--max-concurrency", "2")
            for _, rate in product(range(options.turns), rates):
                seed, number = next(seeds), min(options.num_prompts, int(rate * options.seconds))
                flags = ("--num-prompts", str(number), "--request-rate", str(rate))
                run = bench(options, serving, folder, seed, *flags)
                runs[rate].append((run, run_at(seed, number, rate)))
        print(f"planned capacity {capacity:.1f} requests/s; measured, planned, difference:")
        heads = ("requests/s", "output tokens/s", "TTFT p50 ms", "ITL p50 ms", "TTFT p99 ms")
        print(f"{'rate':>6} | " + " | ".join(f"{head:>24}" for head in heads))
        differences: list[float] = []
        for rate, pairs in runs.items():
            differences += compare(
                rate, [of_bench(run) for run, _ in pairs], [of_plan(plan) for _, plan in pairs]
            )
        print("of the last run of each rate, measured and planned (means):")
        print(f"{'rate':>6} | " + " | ".join(f"{part:>19}" for part in PARTS))
        for rate, pairs in runs.items():
            explain(rate, *pairs[-1])
    worst = max(differences)
    print(f"throughput and TTFT p50 differ by at most {worst:.1%}; the aim is {LIMIT:.0%}")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
