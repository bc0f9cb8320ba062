"""Measure what a routing decision costs, by the number of engines, and how large the index is.

    python -P benchmarks/routing.py

No engine runs. Each of them holds up to 4,000 blocks (all together 400,000) of prompts of its own,
and the first blocks of some prompts that are common to several; the decisions are for these. Times
are the process's CPU time, the best of several rounds, so that a busy machine changes them little.
"""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

from quire.engine.cache.block_hashes import prompt_hashes
from quire.engine.cache.block_recorder import BlockRecorder
from quire.engine.events.block_events import KEY_BYTES, BlockChanges, block_key
from quire.engine.fleet.kv_index import KVIndex
from quire.engine.fleet.router import EngineState, Router

BLOCK_SIZE, BLOCKS_PER_ENGINE, MAX_BLOCKS = 16, 4_000, 400_000
ENGINES, LENGTHS = (8, 100, 1000), (512, 4096, 32768)
HOLDERS = 5
"""Engines that hold a part of each prompt."""


def best(function: Callable[[], object], repeats: int, rounds: int = 5) -> float:
    """Return the microseconds of CPU that a call takes, in the fastest of several rounds."""
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        for _ in range(repeats):
            function()
        times.append((time.process_time() - begin) / repeats * 1e6)
    return min(times)


def fill(num_engines: int, prompts: list[list[bytes]], rng: random.Random) -> KVIndex:
    """Return an index of that many engines, HOLDERS of which know a part of each prompt."""
    index = KVIndex()
    held = [list[bytes]() for _ in range(num_engines)]
    for hashes in prompts:
        for engine in rng.sample(range(num_engines), min(HOLDERS, num_engines)):
            held[engine] += hashes[: rng.randrange(len(hashes))]
    per_engine = min(BLOCKS_PER_ENGINE, MAX_BLOCKS // num_engines)
    for number, hashes in enumerate(held):
        keys = b"".join(map(block_key, hashes))
        keys += rng.randbytes(max(per_engine - len(hashes), 0) * KEY_BYTES)
        index.add_engine(f"engine-{number}")
        index.reset(f"engine-{number}", 0, keys)
    return index


def main() -> None:
    rng = random.Random(1)
    prompts = {
        length: [
            prompt_hashes([rng.randrange(32000) for _ in range(length)], BLOCK_SIZE)
            for _ in range(2)
        ]
        for length in LENGTHS
    }
    print("µs of CPU for a choice, by prompt tokens, and the index")
    print(
        f"{'engines':>8} | "
        + " | ".join(f"{length:>7}" for length in LENGTHS)
        + " |   blocks |    MB"
    )
    for num_engines in ENGINES:
        tracemalloc.start()
        every = [one for some in prompts.values() for one in some]
        index = fill(num_engines, every, rng)
        size = tracemalloc.get_traced_memory()[0] / 1e6
        tracemalloc.stop()
        router = Router(index, BLOCK_SIZE)
        states = [
            EngineState(f"engine-{i}", rng.randrange(2000), rng.randrange(64), rng.randrange(2000))
            for i in range(num_engines)
        ]
        cells = []
        for length, some in prompts.items():
            repeats = max(5, 20_000 // num_engines // (1 + length // 4096))
            choose = partial(router.choose, some[0], length, states, 0.0)
            took = best(choose, repeats)
            cells.append(f"{took:7.0f}")
        print(f"{num_engines:8} | " + " | ".join(cells) + f" | {len(index):8} | {size:5.1f}")
    print("µs of CPU for a prompt's hashes, by its tokens")
    for length in LENGTHS:
        tokens = [rng.randrange(32000) for _ in range(length)]
        print(f"{length:8} | {best(lambda t=tokens: prompt_hashes(t, BLOCK_SIZE), 20):7.0f}")
    hashes = prompts[32768][0][:512]
    tokens = list(range(BLOCK_SIZE))

    def record() -> BlockChanges:
        recorder = BlockRecorder(BLOCK_SIZE)
        for i, own in enumerate(hashes):
            recorder.stored(own, hashes[i - 1] if i else None, tokens, None, None)
        return BlockChanges.of(1, recorder.take())

    index = fill(8, prompts[4096], rng)
    index.reset("engine-0", 0, b"")
    changes = record()
    removal = BlockChanges(2, False, changes.stored, b"")

    def apply() -> None:
        index.apply("engine-0", changes)
        index.apply("engine-0", removal)
        index.reset("engine-0", 0, b"")

    def reset() -> None:
        index.reset("engine-0", 0, b"")

    print("µs of CPU for each block that becomes known")
    print(f"  in the engine, recorded and encoded: {best(record, 20) / len(hashes):.2f}")
    took = best(apply, 5) - best(reset, 5)
    print(f"  in the router, stored and removed: {took / len(hashes):.2f}")
    print(f"  on the wire: {len(changes.stored) / len(hashes):.0f} bytes")


if __name__ == "__main__":
    sys.exit(main())
