"""Compare `quire plan` with `quire bench serve`: the same requests at five rates, planned and
measured.

    python -P benchmarks/plan_accuracy.py

It calibrates the demo model on one CPU thread, starts a server with the same settings, and measures
what HTTP adds: to one request at a time, and, from the processors' time of a crowd, to each output.
Then it plans and measures each rate, between a fifth and nine tenths of the planned capacity. Every
run has prompts of its own, so that none profits from the cache of another. The aim is that
throughput and the median time to the first token differ by at most 10 %. A second table says where
a difference comes from. Nothing else should run on the machine: at least two cores, one for the
engine and one for HTTP and the client.
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
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from quire.engine.plan.calibration import load_calibration
from quire.engine.plan.capacity import highest_rate
from quire.engine.plan.layout import Hardware, Layout, runner
from quire.engine.plan.planned_fleet import FleetRun, Front, PlannedFleet, PlannedRequest
from quire.server.bench.dataset import DatasetOptions, arrival_times, build_workload

SHARES = (0.2, 0.4, 0.6, 0.8, 0.9)
"""Rates, as shares of the planned capacity."""
ENGINE = ("--num-threads", "1", "--num-gpu-blocks-override", "4000", "--max-num-seqs", "64")
ONE = ("--max-concurrency", "1")
MANY = ("--max-concurrency", "16")
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


class Server(NamedTuple):
    """A running server: its address, its HTTP process and its engine's."""

    url: str
    http: psutil.Process
    engine: psutil.Process

    def usage(self) -> dict[str, float]:
        """Return what has been used and counted so far: seconds of processors, and the sums of the
        server's metrics."""
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


COUNTED = {
    "steps": "iteration_tokens_total_count",
    "step_tokens": "iteration_tokens_total_sum",
    "queue": "request_queue_time_seconds_sum",
    "prefill": "request_prefill_time_seconds_sum",
    "ttft": "time_to_first_token_seconds_sum",
    "hits": "prefix_cache_hits_total",
}
"""Sums that the server's metrics have, by the ends of their names."""


@contextmanager
def serving(port: int) -> Iterator[Server]:
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


class Measured(NamedTuple):
    """A run of the benchmark: its numbers, and what the server used and counted meanwhile."""

    run: dict[str, Any]
    used: dict[str, float]

    def latency(self, name: str, percentile: str = "p50") -> float:
        """Return a percentile of a latency in milliseconds."""
        found: float = self.run["latency_ms"][name]["percentiles"][percentile]
        return found

    @property
    def output_seconds(self) -> float:
        """Seconds of processors that the HTTP process and the client took for each token."""
        tokens = self.run["output_tokens_per_s"] * self.run["duration_s"]
        client = self.run["client"]["cpu_share"] * self.run["duration_s"]
        return float((self.used["http"] + client) / tokens)


def bench(
    options: argparse.Namespace, server: Server, folder: Path, seed: int, *flags: str
) -> Measured:
    """Run the benchmark."""
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
    return Measured(run, used)


Pair = tuple[float, float]
"""What was measured, and what was planned."""


def compared(measured: Measured, planned: FleetRun) -> dict[str, Pair]:
    """Return what users feel."""
    run = measured.run
    return {
        "requests/s": (run["requests_per_s"], planned.requests_per_s),
        "output tokens/s": (run["output_tokens_per_s"], planned.output_tokens_per_s),
        "TTFT p50 ms": (measured.latency("ttft"), planned.percentile("ttft", 50) * 1e3),
        "ITL p50 ms": (measured.latency("itl"), planned.percentile("itl", 50) * 1e3),
        "TTFT p99 ms": (measured.latency("ttft", "p99"), planned.percentile("ttft", 99) * 1e3),
    }


def explained(measured: Measured, planned: FleetRun) -> dict[str, Pair]:
    """Return the parts of a first token's time (means), and what they are made of."""
    run, used = measured.run, measured.used
    count, steps = run["num_requests"], used["steps"]
    busy = planned.busy_share * planned.duration

    def mean(values: list[float]) -> float:
        return 1e3 * sum(values) / len(values)

    queue, prefill = (1e3 * used[name] / count for name in ("queue", "prefill"))
    outside = run["latency_ms"]["ttft"]["mean"] - queue - prefill
    planned_outside = mean(planned.ttft) - mean(planned.queue) - mean(planned.prefill)
    return {
        "queue ms": (queue, mean(planned.queue)),
        "first step ms": (prefill, mean(planned.prefill)),
        "HTTP, client ms": (outside, planned_outside),
        "steps": (steps, planned.num_steps),
        "ms a step": (1e3 * used["engine"] / steps, 1e3 * busy / planned.num_steps),
        "engine busy": (used["engine"] / run["duration_s"], planned.busy_share),
        "cached tokens": (used["hits"], planned.cached_tokens),
    }


def print_rows(rows: dict[float, dict[str, Pair]]) -> None:
    """Print a line for each rate: measured, planned, difference."""
    names = list(next(iter(rows.values())))
    print(f"{'rate':>6} | " + " | ".join(f"{name:>24}" for name in names))
    for rate, row in rows.items():
        cells = [
            f"{real:8.1f} {plan:8.1f} {plan / real - 1:+6.1%}"
            if real
            else f"{real:8.1f} {plan:15.1f}"
            for real, plan in row.values()
        ]
        print(f"{rate:6.1f} | " + " | ".join(cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
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
        hardware = Hardware(shape=calibration.shape, calibration=calibration)
        shape, times = calibration.shape, calibration.times
        seed = options.seed
        felt: dict[float, dict[str, Pair]] = {}
        why: dict[float, dict[str, Pair]] = {}
        with serving(options.port) as server:
            # 1. What HTTP adds to a first token, one request at a time; then what it adds to each
            # output of a step, from the processors' time of a crowd.
            alone = bench(options, server, folder, seed, "--num-prompts", "30", *ONE)
            one = PlannedFleet(shape, times, 1).run(workload(options, 1.0, 1, seed))
            crowd = bench(options, server, folder, seed + 1, "--num-prompts", "100", *MANY)
            output = crowd.output_seconds
            ttft = alone.latency("ttft") / 1e3
            front = Front(max(ttft - one.percentile("ttft", 50) - output, 0.0), output)
            print(
                f"one at a time: TTFT {ttft * 1e3:.1f} ms, of which HTTP "
                f"{front.request_seconds * 1e3:.1f} ms; of many, {output * 1e6:.0f} µs an output"
            )
            # 2. Each rate, with prompts of its own.
            seeds = iter(range(seed + 2, seed + 2 + len(SHARES)))

            def plan_at(rate: float, seed: int) -> FleetRun:
                made = workload(options, rate, options.num_prompts, seed)
                return runner(hardware, Layout(1, 1), lambda _: made, front)(rate)

            capacity = highest_rate(lambda rate: plan_at(rate, seed), (), 10.0).rate
            print(f"planned capacity {capacity:.1f} requests/s; measured, planned, difference:")
            for rate, seed in zip([share * capacity for share in SHARES], seeds, strict=True):
                flags = ("--num-prompts", str(options.num_prompts), "--request-rate", str(rate))
                real, planned = bench(options, server, folder, seed, *flags), plan_at(rate, seed)
                felt[rate], why[rate] = compared(real, planned), explained(real, planned)
                print(f"{rate:.1f}/s: done", file=sys.stderr)
        print_rows(felt)
        print("where it comes from (means):")
        print_rows(why)
    differences = [
        abs(plan / real - 1) for row in felt.values() for real, plan in list(row.values())[:3]
    ]
    worst = max(differences)
    print(f"throughput and TTFT p50 differ by at most {worst:.1%}; the aim is {LIMIT:.0%}")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
