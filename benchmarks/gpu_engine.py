"""Check the whole engine against Hugging Face on a GPU, then time it.

    PYTHONPATH=tests/types python benchmarks/gpu_engine.py --budget 300 --out DIR

Needs torch, triton and transformers, but no network and no HTTP package. The workloads are those of
gpu_workloads.py, beside their computed ceiling; transformers' own `generate_batch` runs in the same
process. The most informative parts run first, and what the budget does not reach is reported as
skipped. Writes DIR/gpu_engine.json after each part and prints a table. `--stub`
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

import gpu_points
import torch
from gpu_points import MAX_SEQS, POINTS
from gpu_profile import profile_steps
from gpu_shapes import SHAPES, Limits, write_config
from gpu_workloads import (
    SAMPLED,
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
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS: dict[str, dict[str, Any]] = {
    "graphs, one step ahead": {},
    "graphs": {"async_scheduling": False},
    "eager": {"async_scheduling": False, "enforce_eager": True},
    "blocks of 64": {"block_size": 64},
}
"""The ways to run the engine that are checked."""


def free_memory() -> None:
    """Return the memory of deleted engines and models to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- correctness ---------------------------------------------------------------------------------


def check_family(name: str, count: int = 12, ways: int = len(WAYS)) -> dict[str, Any]:
    """Compare greedy tokens in fp32 with `generate`, over ways to run the engine.

    `count` prompts, and four that begin as some of them, are chunked and batched, with and without
    CUDA graphs and one step ahead.
    """
    torch.manual_seed(0)
    rng = random.Random(1)
    config = CHECKED[name]()
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    model = model.to(DEVICE).eval()
    prompts = [[rng.randrange(3, 1000) for _ in range(rng.randrange(2, 300))] for _ in range(count)]
    prompts += [prompts[0][:100] + prompt[:30] for prompt in prompts[:4]]
    want = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
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
        for label, options in list(WAYS.items())[:ways]:
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
        self._seed = 0

    def add(self, name: str, prompt: list[int], max_tokens: int, *, sampled: bool = False) -> None:
        params = {"seed": self._seed, **SAMPLED} if sampled else {}
        self._seed += 1
        self._core.add_request(make_request(name, prompt, max_tokens, **params))

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
    with torch.device(DEVICE):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation("paged|sdpa")
    generation = GenerationConfig(
        max_new_tokens=mean, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    short = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.generate_batch(inputs=prompts[:8], generation_config=short, progress_bar=False)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    outputs = model.generate_batch(inputs=prompts, generation_config=generation, progress_bar=False)
    seconds = time.perf_counter() - begin
    tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


class ShapeTimes:
    """The engines of one shape, one after another, since each holds most of the device's memory."""

    def __init__(
        self,
        report: Report,
        name: str,
        shape: str,
        limits: Limits,
        folder: Path,
        config: dict[str, Any],
    ) -> None:
        """`name` begins the names of all parts; it is the shape's, but for a run without a GPU."""
        self._report, self._name, self._shape, self._limits = report, name, shape, limits
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
        """Run all workloads. An engine that does not start is tried in plainer ways, under names
        of their own."""
        label = self._name
        bench = self.with_engine(label)
        for words, plainer in (
            ("eager", {"enforce_eager": True}),
            ("eager, no cascade", {"enforce_eager": True, "disable_cascade_attn": True}),
        ):
            if bench is not None or "skipped" in self._report.results[f"{label} start"]:
                break
            free_memory()
            label = f"{self._name} {words}"
            bench = self.with_engine(label, **plainer)
        if bench is None:
            self._report.miss([f"{self._name} workloads"], "no engine has started")
            return
        self._run_parts(bench, label)
        bench = None
        free_memory()

    def _run_parts(self, bench: Bench, label: str) -> None:
        """Run the workloads, with the profiles after those that they explain."""
        parts = bench.parts(label)
        decodes = len(bench.sizes.batches) + 1  # and offline
        profiles: list[tuple[str, Callable[[], Result], float]] = [
            (f"{label} profile {n}", lambda n=n: profile_steps(bench, n), 10)  # type: ignore[misc]
            for n in bench.sizes.batches
        ]
        middle = bench.sizes.batches[1]
        mixed = (f"{label} profile mixed", lambda: profile_steps(bench, middle, arriving=4), 10)
        again = (f"{parts[decodes - 1][0]}, again", parts[decodes - 1][1], 30)
        for name, part, need in [*parts[:decodes], again, *profiles, mixed, *parts[decodes:]]:
            self._report.run(name, part, need)

    def run_comparisons(self) -> None:
        """Measure what features are worth: parts without one of them, or with a float8 cache."""
        report, name = self._report, self._name
        if bench := self.with_engine(f"{name} no cascade", disable_cascade_attn=True):
            report.run(f"{name} no cascade shared prefix", bench.shared_prefix, 15)
        bench = None
        free_memory()
        if bench := self.with_engine(f"{name} not ahead", async_scheduling=False):
            report.run(f"{name} not ahead offline", bench.offline, 30)
        bench = None
        free_memory()
        if DEVICE == "cpu":
            report.miss([f"{name} fp8"], "a float8 cache needs a GPU")
        elif bench := self.with_engine(f"{name} fp8", kv_cache_dtype="fp8"):
            bench.run_fp8(report, name)
        bench = None
        free_memory()

    def run_points(self) -> None:
        """Measure each point of gpu_points.py against its old way."""
        for point in POINTS:
            name = f"{self._name} {point.name}"
            if DEVICE == "cpu" and point.options.get("enable_pdl"):
                self._report.miss([f"{name} decodes"], "dependent launches need a GPU")
                continue
            with point.patched():
                if bench := self.with_engine(name, max_num_seqs=MAX_SEQS, **point.options):
                    for part, run, need in gpu_points.parts(bench, point):
                        self._report.run(f"{name} {part}", run, need)
            bench = None
            free_memory()

    def run_transformers(self) -> None:
        """Run the comparison with transformers."""
        name = f"{self._name} generate_batch"
        if DEVICE == "cpu":
            self._report.miss([name], "transformers' batching needs a GPU")
            return
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
    parser.add_argument("--stages", nargs="*", help="names of the stages to run (default: all)")
    parser.add_argument(
        "--resume", action="store_true", help="add to the results that are in the folder"
    )
    parser.add_argument("--stub", action="store_true", help="tiny shapes, for a run without a GPU")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Report(
        arguments.budget, arguments.out / "gpu_engine.json", device_facts(),
        resume=arguments.resume, device_lives=device_lives,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        times = []
        for name in arguments.shapes:
            shape = "tiny" if arguments.stub else name
            config = engine_options(shape, arguments) | {"block_size": arguments.block_size}
            (path := Path(folder, name)).mkdir()
            write_config(shape, path)
            times.append(
                (name, ShapeTimes(report, name, shape, limits_of(arguments), path, config))
            )
        small = (2, 1) if arguments.stub else ()
        found = stages(report, times, checks=not arguments.no_checks, sizes=small)
        for name in arguments.stages or found:
            report.begin_stage(name)
            found[name]()
    print(table({"quire": report.results}))
    return int(report.failed)


def stages(
    report: Report,
    times: list[tuple[str, ShapeTimes]],
    checks: bool,
    sizes: tuple[int, ...] = (),
) -> dict[str, Callable[[], None]]:
    """Return the stages by name, the most informative first.

    These are: checks of both ways through a model (flat and transformers' own), the workloads, the
    checks of other families, then what single points and the engine's features are worth. `sizes`
    are the further arguments of `check_family`.
    """

    def check(name: str) -> Callable[[], None]:
        return lambda: report.run(f"check {name}", lambda: check_family(name, *sizes), 20)

    families = [*list(CHECKED)[:1], *list(CHECKED)[-1:], *list(CHECKED)[1:-1]] if checks else []
    known = {f"check {name}": check(name) for name in families}
    shapes = {name: one.run for name, one in times}
    found = dict(list(known.items())[:2]) | shapes | dict(list(known.items())[2:])
    if checks:
        found |= {f"{name} points": one.run_points for name, one in times}
        found |= {f"{name} comparisons": one.run_comparisons for name, one in reversed(times)}
        found |= {f"{name} generate_batch": one.run_transformers for name, one in times}
    return found


if __name__ == "__main__":
    sys.exit(main())
