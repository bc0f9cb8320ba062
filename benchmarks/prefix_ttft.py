"""Measure what a shared prompt saves: the second request's time to first token over the first's.

    python benchmarks/prefix_ttft.py

Only the engine runs, on the CPU, with a 30M-parameter Qwen3 shape and random float32 weights. Each
pair of requests has a fresh 2,048-token prompt, and the second request differs in its last 16
tokens. The figure is the median of the pairs' ratios, so that it tolerates a machine whose speed
drifts.
"""

from __future__ import annotations

import random
import statistics
import time

from small_engine import make_random_core, make_request, small_qwen3

from quire.engine.core.engine_core import EngineCore

PROMPT, SUFFIX, PAIRS = 2048, 16, 9


def time_to_first_token(core: EngineCore, name: str, prompt: list[int]) -> float:
    """Run a request for one token and return its seconds."""
    request = make_request(name, prompt, 1)
    begin = time.perf_counter()
    core.add_request(request)
    while core.has_work:
        core.step()
    return time.perf_counter() - begin


def main() -> None:
    rng = random.Random(0)
    core = make_random_core(small_qwen3(), max_model_len=4096, num_blocks=4096)
    print(f"{core.info.num_parameters / 1e6:.1f}M parameters, {PROMPT} tokens of prompt")
    time_to_first_token(core, "warm-up", [7] * PROMPT)
    first, second = [], []
    for i in range(PAIRS):
        common = [rng.randrange(32000) for _ in range(PROMPT - SUFFIX)]
        for times in (first, second):
            suffix = [rng.randrange(32000) for _ in range(SUFFIX)]
            times.append(time_to_first_token(core, f"{i}-{len(first)}", common + suffix))
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    print(
        f"first {statistics.median(first) * 1e3:.0f} ms, "
        f"second {statistics.median(second) * 1e3:.0f} ms, ratio {ratio:.1%}"
    )


if __name__ == "__main__":
    main()
