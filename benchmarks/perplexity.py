"""Measure the perplexity of a model over this repository's documents, through quire's own engine.

    python benchmarks/perplexity.py MODEL [--quantization int8] [--kv-cache-dtype float16]
        [--second-half]

The text is README.md, ARCHITECTURE.md, CONTRIBUTING.md and docs/*.md, in windows of 512 tokens; no
window sees another one. Perplexity is e to the mean of the negative log-probabilities of all tokens
but each window's first; with --second-half, of the second half of each window, which has more of
its text before it. It compares ways to run one model, not models: the tokenizers differ.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from small_engine import make_core
from transformers import AutoTokenizer

from quire.engine.checkpoints.gguf_tokenizer import tokenizer_folder
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokenizer", help="folder of the tokenizer, if not the model's")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40, help="how many; 0: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--second-half", action="store_true")
    arguments = parser.parse_args()
    tokenizer = arguments.tokenizer or tokenizer_folder(arguments.model)
    windows = read_windows(tokenizer, arguments.window)
    windows = windows[: arguments.windows or None]
    core = make_core(
        arguments.model,
        device="cpu",
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
        num_threads=arguments.threads,
        max_model_len=arguments.window + 16,
        max_num_seqs=4,
        max_num_batched_tokens=max(512, arguments.window),
        enable_prefix_caching=False,
        num_blocks=8 * (arguments.window // 16 + 1),
    )
    first = arguments.window // 2 if arguments.second_half else 1
    total, count, began = 0.0, 0, time.process_time()
    for number, window in enumerate(windows):
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        core.add_request(
            Request(
                request_id=str(number),
                prompt_token_ids=tuple(window),
                sampling_params=params,
                arrival_time=time.monotonic(),
            )
        )
        while core.has_work:
            for output in core.step().outputs:
                for at, position in enumerate(output.prompt_logprobs or []):
                    if position is not None and at >= first:
                        total -= position.logprob
                        count += 1
    spent = time.process_time() - began
    print(
        f"perplexity {math.exp(total / count):.3f} over {count} tokens, {spent:.1f} s of CPU",
        flush=True,
    )


def read_windows(tokenizer: str, size: int) -> list[list[int]]:
    """Return the documents as windows of `size` tokens."""
    ids = AutoTokenizer.from_pretrained(tokenizer)(documents(), add_special_tokens=False)[
        "input_ids"
    ]
    return [ids[begin : begin + size] for begin in range(0, len(ids) - size + 1, size)]


def documents() -> str:
    """Return the text."""
    names = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
    files = [*(ROOT / name for name in names), *sorted((ROOT / "docs").glob("*.md"))]
    return "\n\n".join(path.read_text(encoding="utf-8") for path in files)


if __name__ == "__main__":
    main()
