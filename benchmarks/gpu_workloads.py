"""The workloads of the engine benchmarks on a GPU, the same for quire and for vLLM.

    python benchmarks/gpu_workloads.py A.json B.json     # print two results side by side

Shapes are those of real models, with random weights; prompts are token ids, lengths are fixed,
decoding is greedy. An engine implements the protocol `Engine`. Each time is reported beside the
ceiling that memory and compute set (docs/kernels.md). Needs only the standard library, so that it
runs in either engine's environment.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gpu_shapes import (
    SHAPES,
    Limits,
    cost_of,
    decode_seconds,
    offline_seconds,
    prefill_seconds,
)

Result = dict[str, Any]
SAMPLED: dict[str, float] = {"temperature": 0.7, "top_k": 20, "top_p": 0.95}
"""The parameters that Qwen3 recommends for chats."""
MAX_MODEL_LEN, MAX_BATCHED_TOKENS, MAX_SEQS = 16384, 8192, 256


class Engine(Protocol):
    """The engine that a workload drives, configured with the maxima above."""

    kv_tokens: int
    """Tokens whose K and V fit in the cache."""
    kv_bytes_per_element: int

    def add(self, name: str, prompt: list[int], max_tokens: int, *, sampled: bool = False) -> None:
        """Add a request: greedy, or `sampled` as SAMPLED says."""
        ...

    def step(self) -> Mapping[str, int]:
        """Run a step and return the number of new tokens by request name."""
        ...

    def has_work(self) -> bool: ...
    def abort(self, names: list[str]) -> None: ...


class Sizes(NamedTuple):
    """Sizes of a shape's workloads: those of docs/benchmarking.md, or smaller ones for a CPU."""

    requests: int = 256
    lengths: tuple[int, int] = (100, 1024)
    contexts: tuple[int, int] = (1024, 8192)
    batches: tuple[int, ...] = (1, 32, 256)
    steps: int = 50
    prefix: int = 4096
    members: int = 64
    online: tuple[int, int, int, int] = (128, 32, 1024, 128)
    """Requests in all and at once, prompt and output tokens of each."""


TINY_SIZES = Sizes(6, (4, 12), (32, 64), (1, 3), 4, 600, 5, (7, 3, 20, 4))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that the scripts of all engines take."""
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for all parts")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES)[:2])
    parser.add_argument("--limits", type=float, nargs=2, metavar=("TB/s", "TFLOP/s"))
    parser.add_argument("--enforce-eager", action="store_true")


def limits_of(arguments: argparse.Namespace) -> Limits:
    """Return the device's limits from the option --limits, or those of an H200."""
    return Limits(*(value * 1e12 for value in arguments.limits)) if arguments.limits else Limits()


def engine_options(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that both engines get, under the names that they share."""
    return {
        "max_model_len": min(MAX_MODEL_LEN, SHAPES[shape]["max_position_embeddings"]),
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_num_seqs": MAX_SEQS,
        "enforce_eager": arguments.enforce_eager,
        "dtype": "bfloat16",
    }


def sizes_of(shape: str) -> Sizes:
    """Return the workload sizes of a shape."""
    return TINY_SIZES if shape == "tiny" else Sizes()


class Bench:
    """The workloads of one shape on one engine."""

    def __init__(self, engine: Engine, shape: str, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.cost = cost_of(shape, engine.kv_bytes_per_element)
        self.sizes = sizes_of(shape)
        self._ids = range(10, SHAPES[shape]["vocab_size"])
        self._runs = 0

    def _prompts(self, seed: int, lengths: list[int]) -> list[list[int]]:
        rng = random.Random(seed)
        return [rng.choices(self._ids, k=length) for length in lengths]

    def _add(
        self, prompts: list[list[int]], max_tokens: list[int], *, sampled: bool = False
    ) -> list[str]:
        self._runs += 1
        names = [f"{self._runs}-{index}" for index in range(len(prompts))]
        for name, prompt, count in zip(names, prompts, max_tokens, strict=True):
            self.engine.add(name, prompt, count, sampled=sampled)
        return names

    def _drain(self) -> int:
        """Run until no request is left; return the number of new tokens."""
        tokens = 0
        while self.engine.has_work():
            tokens += sum(self.engine.step().values())
        return tokens

    def offline(self) -> Result:
        """Run all requests at once, with uniform random lengths, until none is left."""
        rng = random.Random(0)
        low, high = self.sizes.lengths
        lengths = [
            (rng.randint(low, high), rng.randint(low, high)) for _ in range(self.sizes.requests)
        ]
        prompts = self._prompts(1, [prompt for prompt, _ in lengths])
        begin = time.perf_counter()
        self._add(prompts, [output for _, output in lengths])
        tokens = self._drain()
        seconds = time.perf_counter() - begin
        if tokens != sum(output for _, output in lengths):
            raise RuntimeError(f"{tokens} tokens instead of those requested")
        return self._figures(tokens, seconds, offline_seconds(self.cost, lengths, self.limits))

    def _figures(self, tokens: int, seconds: float, ideal: float) -> Result:
        return {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "ceiling": tokens / ideal,
            "share": ideal / seconds,
        }

    def online(self) -> Result:
        """Keep a fixed number of requests running, as a server does: each that ends makes room for
        the next, so prompts and decodes share steps."""
        total, at_once, prompt, output = self.sizes.online
        waiting = self._prompts(10, [prompt] * total)
        begin, tokens, running = time.perf_counter(), 0, dict[str, int]()
        while waiting or running:
            while waiting and len(running) < at_once:
                running[self._add([waiting.pop()], [output])[0]] = output
            for name, count in self.engine.step().items():
                tokens += count
                running[name] -= count
                if running[name] == 0:
                    del running[name]
        seconds = time.perf_counter() - begin
        decodes = decode_seconds(self.cost, at_once, prompt + output / 2, self.limits)
        ideal = total * prefill_seconds(self.cost, prompt, self.limits)
        return self._figures(tokens, seconds, ideal + decodes * total * output / at_once)

    def decode(self, batch: int, context: int, *, sampled: bool = False) -> Result:
        """Decode `batch` sequences steadily, each after `context` tokens of its own."""
        prompts = self._prompts(2 + batch + context, [context] * batch)
        return self._decode(prompts, sampled=sampled)

    def shared_prefix(self) -> Result:
        """Decode steadily after one common prefix, which the ceiling counts as read once."""
        members, prefix = self.sizes.members, self.sizes.prefix
        common = self._prompts(3, [prefix])[0]
        own = self._prompts(4, [32] * members)
        self._add([common], [1])  # all others find its blocks in the prefix cache
        self._drain()
        return self._decode([common + rest for rest in own], shared=prefix)

    def _decode(
        self, prompts: list[list[int]], shared: int = 0, *, sampled: bool = False
    ) -> Result:
        steps, batch, context = self.sizes.steps, len(prompts), len(prompts[0])
        names = self.start_decodes(prompts, steps, shared, sampled=sampled)
        if isinstance(names, str):
            return {"skipped": names}
        try:
            begin, tokens = time.perf_counter(), 0
            while tokens < steps * batch:
                tokens += sum(self.engine.step().values())
            seconds = time.perf_counter() - begin
        finally:
            self.end_decodes(names)
        own = context + 8 + steps / 2 - shared + shared / batch
        ideal = decode_seconds(self.cost, batch, own, self.limits) * tokens / batch
        return self._figures(tokens, seconds, ideal) | {"step_ms": seconds * batch / tokens * 1e3}

    def start_decodes(
        self, prompts: list[list[int]], steps: int, shared: int = 0, *, sampled: bool = False
    ) -> list[str] | str:
        """Run these prompts until all of them have decoded 8 tokens, with at least `steps` more to
        come. Returns the requests' names, or why they cannot run."""
        batch, context = len(prompts), len(prompts[0])
        # The first sequence to decode runs until the last one's prefill is done; twice the steps
        # that should take leave room for other token budgets.
        longest = steps + 32 + 2 * -(-batch * context // MAX_BATCHED_TOKENS) + batch
        needed = shared + batch * (context - shared + longest)
        if needed > self.engine.kv_tokens:
            return f"{needed} tokens of K and V needed, {self.engine.kv_tokens} fit"
        counts = dict.fromkeys(self._add(prompts, [longest] * batch, sampled=sampled), 0)
        while min(counts.values()) < 8:
            for name, count in self.engine.step().items():
                counts[name] += count
        return list(counts)

    def end_decodes(self, names: list[str]) -> None:
        """Abort these requests."""
        self.engine.abort(names)
        self._drain()

    def prompts_to_profile(self, batch: int) -> list[list[int]]:
        """Return prompts of the shorter context."""
        return self._prompts(20 + batch, [self.sizes.contexts[0]] * batch)

    def prefill(self) -> Result:
        """Run one long prompt for one token; report the fastest of four prompts."""
        tokens = self.sizes.contexts[-1]
        best = float("inf")
        for seed in range(4):
            prompts = self._prompts(5 + seed, [tokens])
            begin = time.perf_counter()
            self._add(prompts, [1])
            self._drain()
            best = min(best, time.perf_counter() - begin)
        return self._figures(tokens, best, prefill_seconds(self.cost, tokens, self.limits))

    def first_token(self) -> None:
        """Run a short prompt for one token."""
        self._add(self._prompts(9, [10]), [1])
        self._drain()

    def parts(self, label: str) -> list[tuple[str, Callable[[], Result], float]]:
        """Return every workload's name, function and seconds, the most informative first."""
        sizes = self.sizes
        short, long = sizes.contexts
        found: list[tuple[str, Callable[[], Result], float]] = [
            (f"{label} decode {n}x{short}", lambda n=n: self.decode(n, short), 15)  # type: ignore[misc]
            for n in sizes.batches
        ]
        middle = sizes.batches[1]
        total, at_once, _, _ = sizes.online
        found += [
            (f"{label} offline {sizes.requests}", self.offline, 30),
            (f"{label} online {total} by {at_once}", self.online, 20),
            (
                f"{label} decode {middle}x{short} sampled",
                lambda: self.decode(middle, short, sampled=True),
                15,
            ),
            (f"{label} prefill {long}", self.prefill, 5),
            (
                f"{label} shared prefix {sizes.members}x{sizes.prefix}", self.shared_prefix, 15,
            ),
        ]  # fmt: skip
        return found + [
            (f"{label} decode {n}x{long}", lambda n=n: self.decode(n, long), 20)  # type: ignore[misc]
            for n in sizes.batches
        ]

    def run_all(self, report: Report, label: str) -> None:
        """Run every workload."""
        for name, part, need in self.parts(label):
            report.run(name, part, need)

    def run_fp8(self, report: Report, label: str) -> None:
        """Run the workloads that gain from a float8 cache: twice the tokens, half the reads."""
        context = self.sizes.contexts[-1]
        batch = self.sizes.batches[1]
        report.run(f"{label} fp8 decode {batch}x{context}", lambda: self.decode(batch, context), 20)
        report.run(f"{label} fp8 offline {self.sizes.requests}", self.offline, 30)


SPOILED = 3
"""Exit code after an error that leaves the device unusable for this process."""
PATIENCE = 60.0
"""Seconds beyond those that a part needs, after which it hangs and its process is ended."""


class Report:
    """Runs parts while the budget lasts, and writes each result at once.

    If a part raises, the error is recorded, and the next part runs unless `device_lives` says no.
    With `resume`, `results` begins with what `path` already holds; a part that ended its process is
    recorded as failed then. `stages` names the caller's stages that have begun.
    """

    def __init__(
        self,
        budget: float,
        path: Path,
        facts: Result,
        *,
        resume: bool = False,
        device_lives: Callable[[], bool] = lambda: True,
    ) -> None:
        self.deadline = time.monotonic() + budget
        self.path, self.facts, self._device_lives = path, facts, device_lives
        self.results: dict[str, Result] = {}
        self.stages: list[str] = []
        if resume and path.exists():
            content = json.loads(path.read_text())
            self.results, self.stages = content["results"], content["stages"]
            if content["running"]:
                why = {"error": "its process died, or was ended because it took too long"}
                self.results[content["running"]] = why
        path.parent.mkdir(parents=True, exist_ok=True)

    def begin_stage(self, name: str) -> None:
        """Record that a stage of the caller has begun."""
        self.stages.append(name)
        self._write()

    def _write(self, running: str = "") -> None:
        content = {
            "facts": self.facts, "stages": self.stages, "running": running,
            "results": self.results,
        }  # fmt: skip
        self.path.write_text(json.dumps(content, indent=1))

    def run(self, name: str, part: Callable[[], Result], need: float = 5.0) -> None:
        """Run a part and record its result, unless fewer than `need` seconds are left.

        Raises SystemExit(SPOILED) after an error that leaves the device unusable. Ends the process
        if the part hangs.
        """
        begin = time.monotonic()
        if begin + need > self.deadline:
            self.results[name] = {"skipped": "out of budget"}
        else:
            self._write(running=name)
            faulthandler.dump_traceback_later(need + PATIENCE, exit=True)
            try:
                self.results[name] = part()
            except Exception as error:
                self.results[name] = {"error": f"{type(error).__name__}: {error}"[:600]}
            faulthandler.cancel_dump_traceback_later()
            self.results[name]["took_s"] = round(time.monotonic() - begin, 1)
        self._write()
        print(name, self.results[name], flush=True)
        if "error" in self.results[name] and not self._device_lives():
            raise SystemExit(SPOILED)

    def miss(self, names: list[str], why: str) -> None:
        """Record that these parts could not run."""
        for name in names:
            self.results[name] = {"skipped": why}
        self._write()

    @property
    def failed(self) -> bool:
        """Whether a part raised or a check did not pass."""
        return any("error" in r or r.get("ok") is False for r in self.results.values())


def table(runs: Mapping[str, Mapping[str, Result]]) -> str:
    """Format the results of one or more engines by part: tokens/s and the share of the ceiling.

    With two engines, add the ratio of the first to the second.
    """
    names = list(dict.fromkeys(name for results in runs.values() for name in results))
    lines = [f"{'part':44}" + "".join(f"{run[:20]:>20}{'share':>8}" for run in runs)]
    for name in names:
        line, rates = f"{name[:44]:44}", []
        for results in runs.values():
            result = results.get(name, {})
            rate = result.get("tokens_per_s")
            rates.append(rate)
            why = next((key for key in ("error", "skipped") if key in result), "")
            shown = why if rate is None else f"{rate:,.0f}"
            if rate is None and "first_token_s" in result:
                shown = f"{result['first_token_s']:.1f} s"
            share = f"{result['share']:.1%}" if "share" in result else ""
            line += f"{shown:>20}{share:>8}"
        if len(rates) == 2 and all(rates):
            line += f"{rates[0] / rates[1]:8.2f}×"
        lines.append(line)
    return "\n".join(lines)


def profile_table(results: Mapping[str, Result]) -> str:
    """Format the profiled steps: where the device's time goes, and how long it is idle."""
    lines = []
    for name, result in results.items():
        if "kernels" not in result:
            continue
        lines.append(
            f"{name}: {result['step_us']:,.0f} µs a step, device idle {result['idle']:.0%}, "
            f"host waits {result['waits']:.0%}"
        )
        lines += [
            f"  {kernel['us_per_step']:9.1f} µs {kernel['count_per_step']:6.1f}× {kernel['name']}"
            for kernel in result["kernels"]
        ]
    return "\n".join(lines)


def main() -> None:
    runs = {}
    for path in sys.argv[1:]:
        content = json.loads(Path(path).read_text())
        runs[content["facts"]["engine"]] = content["results"]
    print(table(runs))


if __name__ == "__main__":
    main()
