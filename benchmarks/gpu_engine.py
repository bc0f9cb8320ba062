"""The whole engine on a bare GPU box: checked against Hugging Face, then timed.

    PYTHONPATH=tests/types python -P benchmarks/gpu_engine.py --budget 300 --out DIR

Needs torch, triton and transformers, no network and no HTTP package. Real shapes with random
weights, token-id prompts, fixed lengths. Parts run in order of how much they tell; what the
budget does not reach is reported as skipped. Writes DIR/gpu_engine.json and prints a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma2 import Gemma2Config
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen3 import Qwen3Config

from quire.engine.config import EngineConfig
from quire.engine.engine_core import EngineCore
from quire.engine.request import Request
from quire.engine.sampling_params import SamplingParams
from quire.engine.worker import Worker

COPY_BANDWIDTH, MATMUL_FLOPS = 4.3e12, 790e12  # H200, measured; replaced by --limits

SHAPES: dict[str, Any] = {
    "qwen3-0.6b": lambda: Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6,
        max_position_embeddings=40960, tie_word_embeddings=True, dtype="bfloat16",
    ),
    "llama-3.1-8b": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        rms_norm_eps=1e-5, tie_word_embeddings=False, dtype="bfloat16",
    ),
}  # fmt: skip

SMALL: dict[str, Any] = {
    "num_hidden_layers": 4, "vocab_size": 1000, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 1024,
}  # fmt: skip
CHECKED: dict[str, Any] = {
    "llama": lambda: LlamaConfig(
        **SMALL, hidden_size=256, intermediate_size=512, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "qwen3": lambda: Qwen3Config(
        **SMALL, hidden_size=256, intermediate_size=512, num_attention_heads=14,
        num_key_value_heads=2, head_dim=128,
    ),
    "mistral": lambda: MistralConfig(
        **SMALL, hidden_size=256, intermediate_size=512, num_attention_heads=8,
        num_key_value_heads=8, sliding_window=100,
    ),
    "gemma2": lambda: Gemma2Config(
        **SMALL, hidden_size=256, intermediate_size=512, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=100,
    ),
}  # fmt: skip

MODES: dict[str, dict[str, Any]] = {
    "ahead": {"async_scheduling": True},
    "graphs": {"async_scheduling": False},
    "eager": {"enforce_eager": True, "async_scheduling": False},
}
"""How steps run: graphs and one step ahead (the default), graphs alone, neither."""


def make_request(name: str, prompt: list[int], max_tokens: int, **params: Any) -> Request:
    values: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True} | params
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling_params=SamplingParams(max_tokens=max_tokens, **values),
        arrival_time=time.monotonic(),
    )


def make_core(folder: Path, **config: Any) -> EngineCore:
    engine_config = EngineConfig(model=str(folder), **config)
    return EngineCore(engine_config, Worker(engine_config))


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


# -- correctness ---------------------------------------------------------------------------------


def check_family(name: str) -> dict[str, Any]:
    """In every mode, chunked and batched: greedy tokens in fp32 against `generate`, and seeded
    ones against those of the first mode."""
    torch.manual_seed(0)
    rng = random.Random(1)
    config = CHECKED[name]()
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    model = model.cuda().eval()
    prompts = [[rng.randrange(3, 1000) for _ in range(rng.randrange(2, 300))] for _ in range(12)]
    prompts += [prompts[0][:100] + prompt[:30] for prompt in prompts[:4]]
    want = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip
        want.append(out[0, len(prompt) :].tolist())
    results: dict[str, Any] = {}
    drawn: list[list[int]] | None = None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        for label, options in {**MODES, "blocks of 64": {"block_size": 64}}.items():
            core = make_core(
                Path(folder), dtype="float32", num_blocks=512, max_num_seqs=16,
                max_num_batched_tokens=256, max_model_len=512, **options,
            )  # fmt: skip
            greedy = complete_all(core, prompts)
            seeded = complete_all(core, prompts, temperature=0.8, top_p=0.9, seed=5)
            drawn = drawn or seeded
            pairs = [*zip(greedy, want, strict=True), *zip(seeded, drawn, strict=True)]
            results[label] = f"{sum(got == wanted for got, wanted in pairs)}/{len(pairs)}"
            del core
            free_memory()
    everything = f"{2 * len(want)}/{2 * len(want)}"
    results["pass"] = all(value == everything for value in results.values())
    return results


def complete_all(core: EngineCore, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    """40 tokens after each prompt, all at once."""
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for name, prompt in zip(tokens, prompts, strict=True):
        core.add_request(make_request(name, prompt, 40, **params))
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None, output.error
            tokens[output.request_id] += output.token_ids
    return list(tokens.values())


# -- the computed ceiling (docs/kernels.md) ------------------------------------------------------


def shape_numbers(config: Any) -> tuple[float, float, int]:
    """Weight bytes read a step, KV bytes a token, and attention FLOPs a (query, key) pair."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * head_dim * 2
    attention *= config.num_attention_heads + config.num_key_value_heads
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    weights = 2.0 * (config.num_hidden_layers * layer + config.vocab_size * config.hidden_size)
    kv = 4.0 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return weights, kv, 4 * config.num_hidden_layers * config.num_attention_heads * head_dim


def decode_seconds(config: Any, batch: int, context: float) -> float:
    weights, kv, pair = shape_numbers(config)
    memory = (weights + batch * context * kv) / COPY_BANDWIDTH
    return max(memory, batch * (weights + pair * context) / MATMUL_FLOPS)


def prefill_seconds(config: Any, tokens: int) -> float:
    weights, _, pair = shape_numbers(config)
    body = weights - 2.0 * config.vocab_size * config.hidden_size
    return (body * tokens + pair * tokens * tokens / 2) / MATMUL_FLOPS


# -- timing --------------------------------------------------------------------------------------


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1000, 100000) for _ in range(length)]


def run_all(core: EngineCore) -> tuple[float, int]:
    """Seconds and tokens until the queue is empty."""
    torch.cuda.synchronize()
    begin, tokens = time.perf_counter(), 0
    while core.has_work:
        tokens += sum(len(output.token_ids) for output in core.step().outputs)
    torch.cuda.synchronize()
    return time.perf_counter() - begin, tokens


def offline(core: EngineCore, config: Any) -> dict[str, Any]:
    """256 requests, lengths uniform 100-1024 in and out."""
    rng = random.Random(0)
    lengths = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(256)]
    for i, (prompt, output) in enumerate(lengths):
        core.add_request(make_request(f"offline-{i}", random_prompt(rng, prompt), output))
    seconds, tokens = run_all(core)
    mean_context = sum(p + o / 2 for p, o in lengths) / len(lengths)
    batch = sum(o for _, o in lengths) / max(o for _, o in lengths)  # average running
    ideal = sum(prefill_seconds(config, p) for p, _ in lengths)
    ideal += tokens / batch * decode_seconds(config, int(batch), mean_context)
    return {"tokens_per_s": tokens / seconds, "seconds": seconds, "ceiling": tokens / ideal}


def decode(core: EngineCore, config: Any, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Steady decode: prompts of `context` tokens, their own each, then `steps` steps of all."""
    rng = random.Random(batch)
    for i in range(batch):
        prompt = random_prompt(rng, context)
        core.add_request(make_request(f"decode-{batch}-{context}-{i}", prompt, 4 * steps + 64))
    while core.stats().num_waiting or core.stats().step_tokens != batch:
        core.step()
    for _ in range(8):
        core.step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        core.step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / steps
    for i in range(batch):
        core.abort_request(f"decode-{batch}-{context}-{i}")
    run_all(core)
    ideal = decode_seconds(config, batch, context + steps / 2)
    return {
        "tokens_per_s": batch / seconds,
        "step_ms": seconds * 1e3,
        "ceiling": batch / ideal,
        "share": ideal / seconds,
    }


def prefill(core: EngineCore, config: Any, tokens: int) -> dict[str, Any]:
    rng = random.Random(tokens)
    best = float("inf")
    for i in range(4):
        core.add_request(make_request(f"prefill-{i}", random_prompt(rng, tokens), 1))
        best = min(best, run_all(core)[0])
    ideal = prefill_seconds(config, tokens)
    return {"tokens_per_s": tokens / best, "ceiling": tokens / ideal, "share": ideal / best}


def shared_prefix(core: EngineCore) -> dict[str, Any]:
    """64 sequences over one 4k prefix: seconds a decode step."""
    rng = random.Random(3)
    common = random_prompt(rng, 4096)
    for i in range(64):
        prompt = common + random_prompt(rng, 32)
        core.add_request(make_request(f"shared-{i}", prompt, 300))
        core.step()
    while core.stats().num_waiting or core.stats().step_tokens != 64:
        core.step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(50):
        core.step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / 50
    for i in range(64):
        core.abort_request(f"shared-{i}")
    run_all(core)
    return {"step_ms": seconds * 1e3, "tokens_per_s": 64 / seconds}


def generate_batch(folder: Path, config: Any, num_requests: int) -> dict[str, Any]:
    """transformers' own continuous batching on the same shape, lengths as in `offline`."""
    from transformers import GenerationConfig

    rng = random.Random(0)
    lengths = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(num_requests)]
    prompts = [random_prompt(rng, prompt) for prompt, _ in lengths]
    mean_output = sum(output for _, output in lengths) // num_requests
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation("paged|sdpa")
    generation = GenerationConfig(
        max_new_tokens=mean_output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    torch.cuda.synchronize()
    begin = time.perf_counter()
    outputs = model.generate_batch(inputs=prompts, generation_config=generation, progress_bar=False)
    seconds = time.perf_counter() - begin
    tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return {"tokens_per_s": tokens / seconds, "seconds": seconds, "requests": num_requests}


class Report:
    """Runs parts while the budget lasts; a part that raises is recorded and the next one runs."""

    def __init__(self, budget: float, out: Path) -> None:
        self.deadline = time.monotonic() + budget
        self.out = out
        self.results: dict[str, Any] = {}

    def run(self, name: str, part: Callable[[], dict[str, Any]], need: float = 5.0) -> None:
        if time.monotonic() + need > self.deadline:
            self.results[name] = {"skipped": "out of budget"}
        else:
            begin = time.monotonic()
            try:
                self.results[name] = part()
            except Exception as error:
                self.results[name] = {"error": f"{type(error).__name__}: {error}"[:600]}
            self.results[name]["took_s"] = round(time.monotonic() - begin, 1)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu_engine.json").write_text(json.dumps(self.results, indent=1))
        print(name, self.results[name], flush=True)


def time_shape(report: Report, shape: str, block_size: int, mode: str, *, all_parts: bool) -> None:
    """Start and decode in this mode; the other parts where `all_parts`."""
    config = SHAPES[shape]()
    label = f"{shape} b{block_size} {mode}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        cores: list[EngineCore] = []

        def start() -> dict[str, Any]:
            begin = time.perf_counter()
            cores.append(
                make_core(
                    folder,
                    load_format="dummy",
                    block_size=block_size,
                    max_model_len=16384,
                    max_num_batched_tokens=8192,
                    max_num_seqs=256,
                    **MODES[mode],
                )  # fmt: skip
            )
            core = cores[0]
            core.add_request(make_request("first", [1000] * 10, 2))
            run_all(core)
            return {"start_s": time.perf_counter() - begin, "num_blocks": core.info.num_blocks}

        report.run(f"{label} start", start, 30)
        if cores:
            core = cores[0]
            report.run(f"{label} decode 1x1k", lambda: decode(core, config, 1, 1024, 100))
            report.run(f"{label} decode 32x1k", lambda: decode(core, config, 32, 1024, 60))
            report.run(f"{label} decode 256x1k", lambda: decode(core, config, 256, 1024, 40), 15)
            report.run(f"{label} offline 256", lambda: offline(core, config), 25)
            if all_parts:
                report.run(f"{label} prefill 8k", lambda: prefill(core, config, 8192))
                report.run(f"{label} decode 32x8k", lambda: decode(core, config, 32, 8192, 40), 15)
                report.run(f"{label} shared prefix", lambda: shared_prefix(core), 15)
            del core
        cores.clear()
        free_memory()
        if block_size == 16 and all_parts:
            report.run(f"{label} generate_batch", lambda: generate_batch(folder, config, 64), 45)
            free_memory()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path("gpu_engine_out"))
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--block-sizes", type=int, nargs="*", default=[16])
    parser.add_argument(
        "--modes", nargs="+", default=list(MODES), choices=list(MODES),
        help="the first is timed in all parts, the others where they differ",
    )  # fmt: skip
    parser.add_argument("--no-checks", action="store_true")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Report(arguments.budget, arguments.out)
    if not arguments.no_checks:
        for name in CHECKED:
            report.run(f"check {name}", lambda name=name: check_family(name), 20)
    for block_size in arguments.block_sizes:
        for shape in arguments.shapes:
            for mode in arguments.modes:
                all_parts = mode == arguments.modes[0]
                time_shape(report, shape, block_size, mode, all_parts=all_parts)
    print(f"{'part':34} {'tokens/s':>10} {'ceiling':>10} {'share':>7} {'step ms':>8}")
    for name, result in report.results.items():
        if "tokens_per_s" in result:
            share = result["tokens_per_s"] / result["ceiling"] if "ceiling" in result else 0.0
            print(
                f"{name:34} {result['tokens_per_s']:10.0f} {result.get('ceiling', 0):10.0f} "
                f"{share:7.1%} {result.get('step_ms', 0):8.2f}"
            )


if __name__ == "__main__":
    main()
