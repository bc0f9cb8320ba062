"""Test that serving launches no kernel that was not compiled while the engine started.

Triton compiles a kernel for each combination of its arguments' types, of the integers that are 1,
and of the integers and addresses that 16 divides. Here each launch is recorded with that
combination, and plain torch computes its result.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from triton.runtime.jit import JITFunction

from quire.engine.config import EngineConfig
from quire.engine.devices.backend import CacheDemand, StartRehearsal
from quire.engine.devices.cpu.draws import CpuDraws
from quire.engine.devices.cuda.draws import CudaDraws
from quire.engine.devices.cuda.layers.kernels import TRITON, Kernels
from quire.engine.devices.cuda.rehearsing import compile_kernels
from quire.engine.devices.cuda.step_graphs import Run
from quire.engine.sampling.plan import DrawGroup
from quire.engine.sampling.sampler import Sampler
from quire.engine.step import BlockCopy
from quire.kernels import checks

from ..models import COMMON, FAMILIES, GEMMA4, build_model, gemma4, not_flat
from ..state_models import FAMILIES as FAMILIES_WITH_STATES
from ..worker_driver import Driver, make_config, make_prompts, make_sequence
from .cuda_on_cpu import REFERENCES, CudaOnCpuBackend, RerunCapture

MODELS: dict[str, Callable[[], Any]] = {
    "flat": lambda: LlamaConfig(**COMMON, head_dim=16),
    "generic": not_flat,
    "experts": FAMILIES["qwen3_moe"],
    "experts, bfloat16": FAMILIES["gpt_oss"],  # with tiles of several shapes
    "flat, head_dim 24": lambda: LlamaConfig(**COMMON, head_dim=24),
    "states": FAMILIES_WITH_STATES["qwen3_5"],
    "generic, head_dim 24": lambda: LlamaConfig(**COMMON, head_dim=24, hidden_act="gelu"),
    "heads of two widths, bfloat16": lambda: gemma4(
        **GEMMA4["shared"], head_dim=256, global_head_dim=512
    ),
}
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_k": 5},
    {"temperature": 0.8, "seed": 3, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.8, "seed": 4, "frequency_penalty": 0.5, "logprobs": 2},
]
Variant = tuple[str, tuple[Any, ...]]


class Recorder:
    """The kernels and the draws of a GPU, which record their launches and compute in torch."""

    def __init__(self) -> None:
        self.variants: set[Variant] = set()
        self.kernels = Kernels(*map(self._recording, Kernels._fields))

    def _recording(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.record(lambda: getattr(TRITON, name)(*args, **options))
            return getattr(REFERENCES, name)(*args, **options)

        return call

    def record(self, launch: Callable[[], object]) -> None:
        """Call a launcher without running its kernels."""

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            values = dict(zip(kernel.arg_names, args, strict=False)) | options
            parts = [
                _specialised(parameter, values.pop(parameter.name)) for parameter in kernel.params
            ]
            self.variants.add((kernel.__name__, (*parts, *sorted(values.items()))))

        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(checks, "interpreting", lambda: True),  # CPU tensors are taken
        ):
            launch()


def _specialised(parameter: Any, value: Any) -> Any:
    """Return what Triton's compiled code depends on: for most integers, only a few properties."""
    if parameter.is_constexpr or value is None:
        return value
    if isinstance(value, Tensor):
        aligned = value.data_ptr() % 16 == 0
        return value.dtype, parameter.do_not_specialize_on_alignment or aligned
    if isinstance(value, int) and not parameter.do_not_specialize:
        return "1" if value == 1 else (value.bit_length() > 31, value % 16 == 0)
    return type(value)


class RecordingDraws(CpuDraws):
    def __init__(self, vocab_size: int, recorder: Recorder) -> None:
        super().__init__(vocab_size)
        self._recorder = recorder

    def draw(self, x: Tensor, best: Tensor, group: DrawGroup, positions: Tensor) -> Tensor:
        self._recorder.record(lambda: CudaDraws().draw(x, best, group, positions))
        return super().draw(x, best, group, positions)


class RunFirst(RerunCapture):
    """A capture that runs a step before it is recorded, as a GPU's does."""

    def __call__(self, run: Run) -> Run:
        run()
        return super().__call__(run)


class RecordingBackend(CudaOnCpuBackend):
    """A CUDA backend that starts as on a GPU."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder.kernels, sizes=[1, 2, 4], mixed=[16, 40], capture=RunFirst())
        self._recorder = recorder

    def make_sampler(self, vocab_size: int) -> Sampler:
        return Sampler(vocab_size, self.device, RecordingDraws(vocab_size, self._recorder))

    def cache_memory(self, demand: CacheDemand, start: StartRehearsal) -> int:
        runner = start(1)
        compile_kernels(runner)
        runner.run_largest_step()
        return 0


@pytest.fixture(params=MODELS)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> EngineConfig:
    build_model(MODELS[request.param]()).save_pretrained(tmp_path)
    dtype = "bfloat16" if request.param.endswith("bfloat16") else "float32"
    return make_config(tmp_path, max_num_batched_tokens=64, dtype=dtype)


def test_serving_meets_no_kernel_first(config: EngineConfig) -> None:
    recorder = Recorder()
    driver = Driver.start(config, RecordingBackend(recorder))
    compiled = set(recorder.variants)
    assert {name for name, _ in compiled} >= {"_copy_blocks_kernel", "_race_pieces_kernel"}
    recorder.variants.clear()
    driver.copies = [BlockCopy(60, 61), BlockCopy(62, 63)]
    for length in (1, 2, 3, 7, 16, 17, 31, 63):
        driver.run([make_sequence(prompt, 2) for prompt in make_prompts([length])])
    for count in (2, 3, 5, 8):
        prompts = make_prompts([5 * i + 1 for i in range(count)])
        pairs = zip(prompts, SAMPLING * 2, strict=False)
        driver.run([make_sequence(prompt, 4, **params) for prompt, params in pairs])
    assert recorder.variants
    late = recorder.variants - compiled
    assert not late, sorted({name for name, _ in late})


def test_the_recorder_sees_what_makes_triton_compile_again() -> None:
    """A stride that is a constant of one launch and not of the next is another kernel."""
    recorder = Recorder()
    weight = torch.ones(8)
    for rows in (torch.ones(3, 8), torch.ones(3, 9)[:, :8], torch.ones(3, 16)[:, :8]):
        recorder.record(lambda rows=rows: TRITON.rms_norm(rows, weight, eps=1e-6))  # type: ignore[misc]
    assert len(recorder.variants) == 2
