"""Measure what evicted blocks in host memory and on disk save: the second turn of a conversation of
4,096 tokens that others have evicted, by its time to first token.

    python benchmarks/memory_tiers.py

Only the engine runs, on the CPU, with a 30M-parameter Qwen3 shape and random float32 weights. The
cache has room for one conversation. Each round has fresh conversations, which take turns in three
engines: without a tier (the second turn is recomputed), with host memory for all blocks, and with
host memory for one conversation over a disk. Three other conversations run between the two turns,
so that in the last of these engines the first turn has left host memory, too. The figures are
medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from typing import Any

from small_engine import make_random_core, make_request, small_qwen3

from quire.engine.core.engine_core import EngineCore

TURN, NEXT, OTHERS, BLOCK_SIZE = 4096, 32, 3, 16
NUM_BLOCKS = (TURN + 512) // BLOCK_SIZE
GIB = 2**30
ONE_CONVERSATION = (TURN + NEXT) * 10 * 2 * 2 * 64 * 2
"""Bytes: 10 layers, K and V, 2 heads of 64 numbers of 16 bits."""


def time_to_first_token(core: EngineCore, name: str, prompt: list[int]) -> float:
    """Run a request for one token and return its seconds."""
    request = make_request(name, prompt, 1)
    begin = time.perf_counter()
    core.add_request(request)
    while core.has_work:
        core.step()
    return time.perf_counter() - begin


def second_turn(core: EngineCore, name: str, rng: random.Random) -> float:
    """Return the seconds of a second turn, after other conversations."""
    first, *others = ([rng.randrange(32000) for _ in range(TURN)] for _ in range(1 + OTHERS))
    time_to_first_token(core, f"{name}-1", first)
    for number, other in enumerate(others):
        time_to_first_token(core, f"{name}-other-{number}", other)
    added = [rng.randrange(32000) for _ in range(NEXT)]
    return time_to_first_token(core, f"{name}-2", first + added)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        kinds: dict[str, dict[str, Any]] = {
            "recomputed": {},
            "host memory": {"kv_offloading_size": GIB},
            "disk": {"kv_offloading_size": ONE_CONVERSATION, "kv_offloading_disk": folder},
        }
        cores = {
            kind: make_random_core(
                small_qwen3(), max_model_len=TURN + 256, num_blocks=NUM_BLOCKS, **config
            )
            for kind, config in kinds.items()
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(rounds + 1):
            for kind, core in cores.items():
                measured = second_turn(core, str(number), random.Random(number))
                if number:  # the first round warms up
                    seconds[kind].append(measured)
        whole = statistics.median(seconds["recomputed"])
        for kind, core in cores.items():
            median = statistics.median(seconds[kind])
            tiers = ", ".join(f"{one.loaded} from {one.tier}" for one in core.stats().tiers)
            print(f"{kind:12} {median * 1e3:7.0f} ms  {median / whole:5.2f}  {tiers}")
            core.close()


if __name__ == "__main__":
    main()
