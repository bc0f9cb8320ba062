"""What a shared prompt saves: the second request's time to first token against the first's.

    python -P benchmarks/prefix_ttft.py

The engine alone, on the CPU: a 30M-parameter Qwen3 shape with random weights in float32. Each
pair has a fresh 2,048-token prompt; the second request differs in its last 16 tokens. The figure
is the median of the pairs' ratios, so that it survives a machine whose speed drifts.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

from transformers.models.qwen3 import Qwen3Config

from quire.engine.config import EngineConfig
from quire.engine.core.engine_core import EngineCore
from quire.engine.request import Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams

PROMPT, SUFFIX, PAIRS = 2048, 16, 9
SHAPE = Qwen3Config(
    vocab_size=32000,
    hidden_size=384,
    intermediate_size=1152,
    num_hidden_layers=10,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)


def time_to_first_token(core: EngineCore, name: str, prompt: list[int]) -> float:
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    begin = time.perf_counter()
    core.add_request(
        Request(
            request_id=name,
            prompt_token_ids=tuple(prompt),
            sampling_params=params,
            arrival_time=time.monotonic(),
        )
    )
    while core.has_work:
        core.step()
    return time.perf_counter() - begin


def main() -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        SHAPE.save_pretrained(Path(name))
        config = EngineConfig(
            model=name, load_format="dummy", device="cpu", max_model_len=4096, num_blocks=4096
        )
        core = EngineCore(config, Worker(config))
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
