"""Run vLLM, if it is installed, on the workloads of gpu_engine.py, with the same parts and JSON.

    python benchmarks/vllm_gpu.py --budget 300 --out DIR
    python benchmarks/gpu_workloads.py DIR/gpu_engine.json DIR/vllm_gpu.json

Weights are random (`load_format="dummy"`), prompts are token ids, and nothing is detokenised. By
default, vLLM's core runs in its own process. VLLM_ENABLE_V1_MULTIPROCESSING=0 runs it in this one,
as gpu_engine.py runs quire's. `--shapes tiny` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_shapes import Limits, write_config
from gpu_workloads import (
    SAMPLED,
    Bench,
    Report,
    Result,
    add_arguments,
    engine_options,
    limits_of,
    table,
)

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # read when vLLM is imported


class VllmEngine:
    """`gpu_workloads.Engine` over vLLM's class for offline use."""

    def __init__(self, folder: Path, **options: Any) -> None:
        from vllm import LLM

        self._llm = LLM(model=str(folder), load_format="dummy", skip_tokenizer_init=True, **options)
        self._engine = self._llm.llm_engine
        cache = self._engine.vllm_config.cache_config
        self.kv_tokens = cache.num_gpu_blocks * cache.block_size
        self.kv_bytes_per_element = 1 if cache.cache_dtype.startswith("fp8") else 2

    def add(self, name: str, prompt: list[int], max_tokens: int, *, sampled: bool = False) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            **(SAMPLED if sampled else {"temperature": 0.0}),
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def step(self) -> Mapping[str, int]:
        return {
            output.request_id: len(output.outputs[0].token_ids) for output in self._engine.step()
        }

    def has_work(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def abort(self, names: list[str]) -> None:
        self._engine.abort_request(names)

    def close(self) -> None:
        """Stop the core and free its memory."""
        self._engine.engine_core.shutdown()
        del self._engine, self._llm
        gc.collect()


def facts() -> Result:
    """Return the versions and the device; SystemExit if vLLM cannot be imported."""
    import torch

    try:
        import vllm
    except ImportError as error:
        raise SystemExit(f"vLLM cannot be imported here: {error}") from error

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {"engine": f"vllm {vllm.__version__}", "device": device, "torch": torch.__version__}


def time_shape(report: Report, shape: str, limits: Limits, options: dict[str, Any]) -> None:
    """Run all workloads of a shape, and those for a float8 cache, each on a new engine."""
    engines: list[VllmEngine] = []

    def start(folder: Path, label: str, **more: Any) -> Bench | None:
        def part() -> Result:
            begin = time.perf_counter()
            engines.append(VllmEngine(folder, **options, **more))
            Bench(engines[-1], shape, limits).first_token()
            return {
                "first_token_s": time.perf_counter() - begin,
                "kv_tokens": engines[-1].kv_tokens,
            }

        report.run(f"{label} start", part, 40)
        return Bench(engines[-1], shape, limits) if engines else None

    def stop() -> None:
        while engines:
            engines.pop().close()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(shape, folder)
        if bench := start(folder, shape):
            bench.run_all(report, shape)
        stop()
        if shape != "tiny":
            if bench := start(folder, f"{shape} fp8", kv_cache_dtype="fp8"):
                bench.run_fp8(report, shape)
            stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    arguments = parser.parse_args()
    report = Report(arguments.budget, arguments.out / "vllm_gpu.json", facts())
    for shape in arguments.shapes:
        options = engine_options(shape, arguments) | {
            "gpu_memory_utilization": arguments.gpu_memory_utilization,
            "enable_prefix_caching": True,
        }
        time_shape(report, shape, limits_of(arguments), options)
    print(table({report.facts["engine"]: report.results}))
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())
