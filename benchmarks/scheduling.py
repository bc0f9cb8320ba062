"""Measure the host's CPU time for a decode step, by part and by the number of running sequences.

    python benchmarks/scheduling.py [--run-ahead] [--plot FILE.svg] [--profile 256]

This runs all that an engine process does, except for the model (see scripted_worker.py): schedule;
launch (the verbs forward and sample), which lays out the inputs and plans the sampling; results and
update; and send, which encodes the client's message and passes it to ZeroMQ. Every sequence samples
one token per step. All sequences cross a block boundary in the same step, and then their full
blocks are hashed and indexed. So the figures are means over spans of as many steps as a block has
tokens, from the fastest of ten such spans. They are CPU times of the engine's thread.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import zmq
from scripted_worker import ScriptedWorker

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.process import engine_process, wire
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams
from quire.engine.step import SamplingConstraints, SchedulerOutput
from quire.engine.worker_protocol import Forward, Results
from quire.server.bench.plot import Panel, Series, render_svg

BLOCK_SIZE, PROMPT, STEPS, WARM_UP = 16, 40, 160, 32
PARTS = ("schedule", "launch", "results", "update", "send", "step")
DEMO = Path(__file__).parents[1] / "configs" / "demo"

Times = dict[str, list[float]]


class _TimedSample(NamedTuple):
    host: Host
    step: Forward

    def sample(self, constraints: SamplingConstraints) -> Results:
        return self.host.sample(self.step, constraints)


class Host:
    """The core and the socket of an engine process, without the process."""

    def __init__(self, num_seqs: int, run_ahead: bool) -> None:
        config = EngineConfig(
            model=str(DEMO),
            block_size=BLOCK_SIZE,
            max_model_len=1024,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_seqs * PROMPT,
            num_blocks=max(num_seqs * 20, 300),
            async_scheduling=run_ahead,
        )
        self.times: Times = {part: [] for part in PARTS}
        worker = ScriptedWorker(config, 0.0)
        self._core = EngineCore(config, worker)
        self._server = engine_process.EngineServer(zmq.Context.instance().socket(zmq.ROUTER))
        self._server._clients.append(b"client")
        self._server._core = self._core
        for i in range(num_seqs):
            request = Request(
                request_id=f"cmpl-{i:032}",
                prompt_token_ids=tuple((i * 7 + j) % 1500 for j in range(PROMPT)),
                sampling_params=SamplingParams(max_tokens=STEPS + WARM_UP + 2, ignore_eos=True),
                arrival_time=0.0,
            )
            self._server._handle(self._core, b"client", wire.Add(request))
        scheduler = self._core._scheduler
        self._time(scheduler, "schedule", "schedule")
        self._time(scheduler, "update_from_output", "update")
        self._time(self._server, "_send_step", "send")
        launches, begin = self.times["launch"], worker.forward

        def forward(output: SchedulerOutput) -> Forward:
            started = time.thread_time()
            step = begin(output)
            launches.append(time.thread_time() - started)
            return _TimedSample(self, step)

        worker.forward = forward  # type: ignore[method-assign]

    def sample(self, step: Forward, constraints: SamplingConstraints) -> Results:
        """The second half of a launch; its results are timed when they are asked for."""
        started = time.thread_time()
        results = step.sample(constraints)
        self.times["launch"][-1] += time.thread_time() - started
        return self._timed(results, "results")

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return the function, with its times recorded under `part`."""
        times = self.times[part]

        def call(*args: Any) -> Any:
            begin = time.thread_time()
            result = function(*args)
            times.append(time.thread_time() - begin)
            return result

        return call

    def _time(self, owner: object, name: str, part: str) -> None:
        setattr(owner, name, self._timed(getattr(owner, name), part))

    def run(self, steps: int) -> None:
        """Run and time this many steps."""
        for _ in range(steps):
            begin = time.thread_time()
            self._server._send_step(self._core.step())
            self.times["step"].append(time.thread_time() - begin)


def measure(num_seqs: int, run_ahead: bool = False) -> dict[str, float]:
    """Return the mean CPU microseconds of a step's parts, in the span with the fastest steps."""
    host = Host(num_seqs, run_ahead)
    gc.collect()
    gc.freeze()
    host.run(WARM_UP + STEPS)
    gc.unfreeze()
    spans = [slice(at, at + BLOCK_SIZE) for at in range(WARM_UP, WARM_UP + STEPS, BLOCK_SIZE)]
    best = min(spans, key=lambda span: sum(host.times["step"][span]))
    return {part: statistics.mean(times[best]) * 1e6 for part, times in host.times.items()}


def profile(num_seqs: int, run_ahead: bool) -> None:
    """Print the time by function. The profiler makes calls look more expensive than they are."""
    host = Host(num_seqs, run_ahead)
    gc.collect()
    gc.freeze()
    host.run(WARM_UP)
    profiler = cProfile.Profile(time.thread_time)
    profiler.enable()
    host.run(STEPS)
    profiler.disable()
    print(f"{STEPS} steps")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=(16, 64, 256, 512, 1024))
    parser.add_argument(
        "--run-ahead", action="store_true", help="launch steps one ahead, as on a GPU"
    )
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--profile", type=int, metavar="SEQUENCES")
    options = parser.parse_args()
    if options.profile:
        return profile(options.profile, options.run_ahead)
    print(f"{'running':>7} | " + " | ".join(f"{part:>8}" for part in PARTS) + "   µs")
    measured = {num_seqs: measure(num_seqs, options.run_ahead) for num_seqs in options.sizes}
    for num_seqs, parts in measured.items():
        print(f"{num_seqs:7} | " + " | ".join(f"{parts[part]:8.0f}" for part in PARTS))
    if options.plot:
        series = [
            Series(part, [(num_seqs, parts[part]) for num_seqs, parts in measured.items()])
            for part in PARTS
        ]
        each = [(num_seqs, parts["step"] / num_seqs) for num_seqs, parts in measured.items()]
        panels = [
            Panel("Host time of a decode step", "running sequences", "µs of CPU", series),
            Panel("For each sequence", "running sequences", "µs of CPU", [Series("step", each)]),
        ]
        options.plot.write_text(render_svg(panels), encoding="utf-8")


if __name__ == "__main__":
    main()
