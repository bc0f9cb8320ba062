"""How long a step takes on the CPU: decodes at several batch sizes, and a prefill.

    python -P benchmarks/cpu_step.py [--threads 1] [--dtype bfloat16]

The engine process has OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=10000: set them here too.

The engine without HTTP: a 30M-parameter Qwen3 shape with random weights. A decode step has a
context of about 300 tokens in every row; the prefill is one prompt of 256 tokens. The figure is
the fastest of many steps, which other load on the machine disturbs least; the median stands
beside it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers.models.qwen3 import Qwen3Config

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.request import Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams

CONTEXT, PREFILL = 300, 256
SHAPE = Qwen3Config(
    vocab_size=32000,
    hidden_size=384,
    intermediate_size=1152,
    num_hidden_layers=10,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


class Bench:
    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.rng = random.Random(0)
        self.requests = 0

    def add(self, length: int, max_tokens: int) -> None:
        self.requests += 1
        prompt = tuple(self.rng.randrange(3, SHAPE.vocab_size) for _ in range(length))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.core.add_request(
            Request(
                request_id=str(self.requests),
                prompt_token_ids=prompt,
                sampling_params=params,
                arrival_time=time.monotonic(),
            )
        )

    def steps(self, count: int) -> list[float]:
        """Wall seconds of each of the next `count` steps."""
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            self.core.step()
            times.append(time.perf_counter() - begin)
        return times

    def finish(self) -> None:
        while self.core.has_work:
            self.core.step()

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        """Times of decode steps of `batch` rows around `context` tokens."""
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
        times = []
        for _ in range(repeats):
            self.add(length, 1)
            times += self.steps(1)
            self.finish()
        return times


def make_core(arguments: argparse.Namespace) -> EngineCore:
    with tempfile.TemporaryDirectory() as name:
        SHAPE.save_pretrained(Path(name))
        config = EngineConfig(
            model=name,
            load_format="dummy",
            device="cpu",
            dtype=arguments.dtype,
            num_blocks=8192,
            num_threads=arguments.threads,
        )
        return EngineCore(config, Worker(config))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    bench = Bench(make_core(arguments))
    print(f"{bench.core.info.num_parameters / 1e6:.1f}M, {torch.get_num_threads()} threads")
    bench.decode(2, 64, 10)
    for batch in arguments.batches:
        times = bench.decode(batch, arguments.context, arguments.steps)
        report(f"decode batch {batch}, context {arguments.context}", times)
    report(f"prefill {PREFILL}", bench.prefill(PREFILL, 12))


def report(name: str, times: list[float]) -> None:
    print(
        f"{name:32} fastest {min(times) * 1e3:7.2f} ms  median "
        f"{statistics.median(times) * 1e3:7.2f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
