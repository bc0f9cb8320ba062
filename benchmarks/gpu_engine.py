"""Check the whole engine against Hugging Face on a GPU, then time it.

    PYTHONPATH=tests/types python benchmarks/gpu_engine.py --budget 300 --out DIR

Needs torch, triton and transformers, but no network and no HTTP package. The workloads are those of
gpu_workloads.py, beside their computed ceiling; transformers' own `generate_batch` runs in the same
process. The most informative parts run first, and what the budget does not reach is reported as
skipped. Writes DIR/gpu_engine.json after each part and prints a table. `--shapes tiny --no-checks`
tries the script on a CPU. The exit code is 1 if a part failed, and 3 if an error left the device
unusable for this process (a CUDA error does): `--resume` then continues with the next stage.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from gpu_shapes import SHAPES, Limits, write_config
from gpu_workloads import (
    Bench,
    Report,
    Result,
    add_arguments,
    engine_options,
    limits_of,
    sizes_of,
    table,
)
from small_engine import make_core, make_request
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen3 import Qwen3Config

from quire.engine.config import EngineConfig

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
"""Small models of the families that are checked, by name."""


def process_age() -> float:
    """Return the seconds since this process began (proc(5): starttime, in ticks since boot)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begun = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begun


IMPORTS_S = process_age()


def free_memory() -> None:
    """Return the memory of deleted engines and models to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- correctness ---------------------------------------------------------------------------------


def check_family(name: str) -> dict[str, Any]:
    """Compare greedy tokens in fp32 with `generate`, over ways to run the engine.

    Prompts are chunked and batched, with and without CUDA graphs and one step ahead.
    """
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
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        for label, options in {
            "graphs, one step ahead": {},
            "graphs": {"async_scheduling": False},
            "eager": {"async_scheduling": False, "enforce_eager": True},
            "blocks of 64": {"block_size": 64},
        }.items():
            core = make_core(
                Path(folder), dtype="float32", num_blocks=512, max_num_seqs=16,
                max_num_batched_tokens=256, max_model_len=512, **options,
            )  # fmt: skip
            got: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
            for i, prompt in enumerate(prompts):
                core.add_request(make_request(str(i), prompt, 40))
            while core.has_work:
                for output in core.step().outputs:
                    assert output.error is None, output.error
                    got[output.request_id] += output.token_ids
            equal = sum(got[str(i)] == tokens for i, tokens in enumerate(want))
            results[label] = f"{equal}/{len(want)}"
            del core
            free_memory()
    results["ok"] = all(value == f"{len(want)}/{len(want)}" for value in results.values())
    return results


# -- timing --------------------------------------------------------------------------------------


class QuireEngine:
    """`gpu_workloads.Engine` over an engine in this process."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self._core = make_core(folder, load_format="dummy", **config)
        self.kv_tokens = self._core.info.kv_capacity_tokens
        self.kv_bytes_per_element = 1 if config.get("kv_cache_dtype") == "fp8" else 2

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        self._core.add_request(make_request(name, prompt, max_tokens))

    def step(self) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        for output in self._core.step().outputs:
            if output.error is not None:
                raise RuntimeError(f"{output.request_id}: {output.error.message}")
            counts[output.request_id] += len(output.token_ids)
        return counts

    def has_work(self) -> bool:
        return self._core.has_work

    def abort(self, names: list[str]) -> None:
        for name in names:
            self._core.abort_request(name)


def generate_batch(folder: Path, shape: str) -> Result:
    """Time transformers' own continuous batching on the requests of `Bench.offline`.

    Every request gets the mean output length, since `generate_batch` takes one length for all. The
    second run is timed, when all kernels are loaded.
    """
    sizes, rng = sizes_of(shape), random.Random(0)
    lengths = [
        (rng.randint(*sizes.lengths), rng.randint(*sizes.lengths)) for _ in range(sizes.requests)
    ]
    rng, ids = random.Random(1), range(10, SHAPES[shape]["vocab_size"])
    prompts = [rng.choices(ids, k=prompt) for prompt, _ in lengths]
    mean = round(sum(output for _, output in lengths) / len(lengths))
    with torch.device("cuda"):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation("paged|sdpa")
    generation = GenerationConfig(
        max_new_tokens=mean, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    short = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.generate_batch(inputs=prompts[:8], generation_config=short, progress_bar=False)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    outputs = model.generate_batch(inputs=prompts, generation_config=generation, progress_bar=False)
    seconds = time.perf_counter() - begin
    tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


class ShapeTimes:
    """The engines of one shape, one after another, since each holds most of the device's memory."""

    def __init__(
        self, report: Report, shape: str, limits: Limits, folder: Path, config: dict[str, Any]
    ) -> None:
        self._report, self._shape, self._limits = report, shape, limits
        self._folder, self._config = folder, config

    def with_engine(self, label: str, **config: Any) -> Bench | None:
        """Start an engine and time it up to a first token; None if that failed or was skipped."""
        found: list[Bench] = []
        missing = config.keys() - {field.name for field in fields(EngineConfig)}

        def part() -> Result:
            if missing:
                return {"skipped": f"this engine has no {', '.join(missing)}"}
            begin = time.perf_counter()
            engine = QuireEngine(self._folder, **self._config | config)
            bench = Bench(engine, self._shape, self._limits)
            bench.first_token()
            found.append(bench)
            return {
                "first_token_s": time.perf_counter() - begin,
                "imports_s": IMPORTS_S,
                "kv_tokens": engine.kv_tokens,
            }

        self._report.run(f"{label} start", part, 40)
        return found[0] if found else None

    def run(self) -> None:
        """Run all workloads."""
        if bench := self.with_engine(self._shape):
            bench.run_all(self._report, self._shape)
        bench = None
        free_memory()

    def run_comparisons(self) -> None:
        """Measure what features are worth: parts without one of them, or with a float8 cache."""
        report, shape = self._report, self._shape
        if bench := self.with_engine(f"{shape} no cascade", disable_cascade_attn=True):
            report.run(f"{shape} no cascade shared prefix", bench.shared_prefix, 15)
        bench = None
        free_memory()
        if bench := self.with_engine(f"{shape} not ahead", async_scheduling=False):
            report.run(f"{shape} not ahead offline", bench.offline, 30)
        bench = None
        free_memory()
        if bench := self.with_engine(f"{shape} fp8", kv_cache_dtype="fp8"):
            bench.run_fp8(report, shape)
        bench = None
        free_memory()

    def run_transformers(self) -> None:
        """Run the comparison with transformers."""
        name = f"{self._shape} generate_batch"
        self._report.run(name, lambda: generate_batch(self._folder, self._shape), 60)
        free_memory()


def device_lives() -> bool:
    """Return whether this process can still use the device."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def device_facts() -> Result:
    """Return the device and the version of torch."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"engine": "quire", "device": device, "torch": torch.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument(
        "--resume", action="store_true", help="continue after the last stage begun in the folder"
    )
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Report(
        arguments.budget, arguments.out / "gpu_engine.json", device_facts(),
        resume=arguments.resume, device_lives=device_lives,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        times = []
        for shape in arguments.shapes:
            config = engine_options(shape, arguments) | {"block_size": arguments.block_size}
            (path := Path(folder, shape)).mkdir()
            write_config(shape, path)
            times.append(ShapeTimes(report, shape, limits_of(arguments), path, config))
        for stage in stages(report, times, checks=not arguments.no_checks)[report.stages :]:
            report.begin_stage()
            stage()
    print(table({"quire": report.results}))
    return int(report.failed)


def stages(report: Report, times: list[ShapeTimes], checks: bool) -> list[Callable[[], None]]:
    """Return the stages, the most informative first.

    These are: checks of both ways through a model (flat and transformers' own), the workloads, the
    checks of other families, then what the engine's features are worth.
    """

    def check(name: str) -> Callable[[], None]:
        return lambda: report.run(f"check {name}", lambda: check_family(name), 20)

    first, *others = [check(name) for name in CHECKED] if checks else [lambda: None]
    found = [first, *others[-1:], *(one.run for one in times), *others[:-1]]
    if torch.cuda.is_available():
        found += [one.run_comparisons for one in reversed(times)]
        found += [one.run_transformers for one in times]
    return found


if __name__ == "__main__":
    sys.exit(main())
