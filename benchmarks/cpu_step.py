"""Measure how long a step takes on the CPU: decodes at several batch sizes, and a prefill.

    python benchmarks/cpu_step.py [MODEL] [--shape 440M] [--threads 1] [--quantization int8]

The engine process sets OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=10000: set them here too.

The engine runs without HTTP, with MODEL or else random weights in a Qwen3 shape: of 30M parameters,
or of Qwen3-0.6B's layers, which have 440M, and a head of 32,000 tokens.
Every row of a decode step has a context of about 300 tokens; the prefill is one prompt of 256
tokens. The reported figure is the fastest of many steps, which other load on the machine disturbs
least, beside the median. On a machine that has much else to do, --cpu-time with --threads 1 reports
the CPU time of steps instead of the time that passes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from small_engine import make_core, make_random_core, make_request, small_qwen3
from transformers.models.qwen3 import Qwen3Config

from quire.engine.core.engine_core import EngineCore

CONTEXT, PREFILL = 300, 256
SHAPES = {
    "30M": small_qwen3(),
    "440M": Qwen3Config(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}


class Bench:
    """The step times of one engine."""

    def __init__(self, core: EngineCore, clock: Callable[[], float]) -> None:
        self.core, self.clock = core, clock
        self.rng = random.Random(0)
        self.requests = 0

    def add(self, length: int, max_tokens: int) -> None:
        """Add a request with a random prompt of `length` tokens."""
        self.requests += 1
        prompt = [self.rng.randrange(3, self.core.info.vocab_size) for _ in range(length)]
        self.core.add_request(make_request(str(self.requests), prompt, max_tokens))

    def steps(self, count: int) -> list[float]:
        """Run `count` steps and return the seconds of each."""
        times = []
        for _ in range(count):
            begin = self.clock()
            self.core.step()
            times.append(self.clock() - begin)
        return times

    def finish(self) -> None:
        """Run until no request is left."""
        while self.core.has_work:
            self.core.step()

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        """Return the times of decode steps of `batch` rows with about `context` tokens each."""
        for _ in range(batch):
            self.add(context - steps // 2, steps + 8)
        while True:  # until all rows decode
            self.core.step()
            stats = self.core.stats()
            if stats.num_waiting == 0 and stats.num_running == batch:
                break
        self.core.step()
        times = self.steps(steps)
        self.finish()
        return times

    def prefill(self, length: int, repeats: int) -> list[float]:
        """Return the times of prefills of `length` tokens, one prompt each."""
        times = []
        for _ in range(repeats):
            self.add(length, 1)
            times += self.steps(1)
            self.finish()
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shape", choices=SHAPES, default="30M")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--quantization")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--num-blocks", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prefills", type=int, default=12)
    arguments = parser.parse_args()
    config = {
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "num_threads": arguments.threads,
        "num_blocks": arguments.num_blocks,
        "speculation": "off",  # a decode is to be of one token
    }
    if arguments.model is None:
        core = make_random_core(SHAPES[arguments.shape], **config)
    else:
        core = make_core(arguments.model, device="cpu", **config)
    bench = Bench(core, time.thread_time if arguments.cpu_time else time.perf_counter)
    print(f"{bench.core.info.num_parameters / 1e6:.1f}M, {torch.get_num_threads()} threads")
    bench.decode(2, 64, 10)
    for batch in arguments.batches:
        times = bench.decode(batch, arguments.context, arguments.steps)
        report(f"decode batch {batch}, context {arguments.context}", times)
    if arguments.prefills:
        report(f"prefill {PREFILL}", bench.prefill(PREFILL, arguments.prefills))


def report(name: str, times: list[float]) -> None:
    """Print the fastest and the median of these seconds."""
    print(
        f"{name:32} fastest {min(times) * 1e3:7.2f} ms  median "
        f"{statistics.median(times) * 1e3:7.2f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
