"""Measure what a step of 16 constrained sequences costs over one of 16 free ones.

    python benchmarks/structured.py [--vocab 32000 1536] [--threads 1] [--greedy]

The engine runs without HTTP on the CPU, with a 30M-parameter Qwen3 shape, random weights, contexts
of about 300 tokens and a byte-level BPE tokenizer trained on the standard library's sources.
Answers are endless arrays of records (strings, numbers, enums, nested lists), each with its own
seed, so that the sequences are in different states. Batches of both kinds alternate on one engine;
the figure of a batch is its median step, the result is the median ratio of neighbouring batches.
The CPU time of all threads, masks included, is reported beside the wall time: it is what a step
costs when every core is busy.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from small_engine import make_core, make_request, small_qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quire.engine.core.engine_core import EngineCore
from quire.engine.request import GrammarSpec

BATCH, CONTEXT, STEPS = 16, 300, 24
END = "<|endoftext|>"
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "id": {"type": "integer", "minimum": 0, "maximum": 99999},
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["message", "order", "refund", "question"]},
            "score": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
            "place": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "open": {"type": "boolean"}},
                "required": ["city", "open"],
                "additionalProperties": False,
            },
        },
        "required": ["id", "name", "kind", "score", "tags", "place"],
        "additionalProperties": False,
    },
}


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of this size on Python's standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(map(str, Path(os.__file__).parent.glob("*.py")))
    sources += sorted(map(str, Path(os.__file__).parent.glob("[a-i]*/*.py")))
    tokenizer.train(sources, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


class Bench:
    """Batches of the same prompts on one engine, constrained or free."""

    def __init__(self, core: EngineCore, temperature: float) -> None:
        self.core = core
        self.temperature = temperature
        self.turns = 0
        rng = random.Random(0)
        self.prompts = [
            tuple(rng.randrange(3, core.info.vocab_size) for _ in range(CONTEXT))
            for _ in range(BATCH)
        ]

    def turn(self, grammar: GrammarSpec | None) -> tuple[float, float]:
        """Run a batch; return the median wall and CPU milliseconds of its decode steps.

        The prompts are cached after the first batch.
        """
        self.turns += 1
        for number, prompt in enumerate(self.prompts):
            request = make_request(
                f"{self.turns}-{number}",
                prompt,
                8 * STEPS,
                temperature=self.temperature,
                seed=self.turns * BATCH + number,
                grammar=grammar,
            )
            self.core.add_request(request)
        while len(self.core.step().outputs) < BATCH:
            pass
        walls, cpus = [], []
        for _ in range(STEPS):
            wall, cpu = time.perf_counter(), time.process_time()
            self.core.step()
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        for number in range(BATCH):
            self.core.abort_request(f"{self.turns}-{number}")
        while self.core.has_work:
            self.core.step()
        return statistics.median(walls) * 1e3, statistics.median(cpus) * 1e3


def measure(vocab_size: int, temperature: float, turns: int, threads: int | None) -> None:
    """Alternate both kinds of batch `turns` times, after a warm-up, and print the ratios."""
    grammar = GrammarSpec("json", json.dumps(SCHEMA))
    with tempfile.TemporaryDirectory() as folder:
        small_qwen3(vocab_size, eos_token_id=0).save_pretrained(folder)
        train_tokenizer(vocab_size).save_pretrained(folder)
        core = make_core(
            folder, load_format="dummy", device="cpu", num_blocks=2048, num_threads=threads
        )
        bench = Bench(core, temperature)
        pairs = [(bench.turn(grammar), bench.turn(None)) for _ in range(turns + 1)][1:]
    kind = "greedy" if temperature == 0 else "sampled"
    print(f"vocabulary {vocab_size}, {torch.get_num_threads()} threads, {kind}:")
    for at, name in enumerate(("wall", "CPU")):
        ratios = sorted(constrained[at] / free[at] for constrained, free in pairs)
        print(
            f"  {name:4} constrained {statistics.median(pair[0][at] for pair in pairs):6.2f} ms, "
            f"free {statistics.median(pair[1][at] for pair in pairs):6.2f} ms, "
            f"ratio {statistics.median(ratios):.3f} "
            f"(quartiles {ratios[turns // 4]:.3f}, {ratios[-1 - turns // 4]:.3f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="*", default=[1536, 32000])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--greedy", action="store_true")
    arguments = parser.parse_args()
    for vocab_size in arguments.vocab:
        measure(vocab_size, 0.0 if arguments.greedy else 1.0, arguments.turns, arguments.threads)


if __name__ == "__main__":
    main()
