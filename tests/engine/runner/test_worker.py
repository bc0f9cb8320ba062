"""Test the worker as the engine sees it, and the CUDA path as far as it runs on a CPU."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine.config import WorkerInfo
from quire.engine.devices.backend import CacheDemand, Rehearsal
from quire.engine.devices.cuda.backend import CudaBackend, compile_kernels
from quire.engine.embedding_spec import NO_LAYOUT
from quire.engine.errors import ConfigurationError, DeviceMemoryError, UnsupportedModelError
from quire.engine.runner.worker import Worker, default_num_threads
from quire.engine.worker_protocol import WorkerProtocol

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..models import MAX_POSITION, WINDOW, generate, save_model
from ..worker_driver import Driver, make_config, make_sequence

pytestmark = pytest.mark.usefixtures("same_number_of_threads")


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("gemma2")
    return folder, save_model("gemma2", folder)


def test_load_and_profile_report_the_model_and_its_blocks(gemma2: tuple[Path, Any]) -> None:
    folder, model = gemma2
    worker: WorkerProtocol = Worker(make_config(folder, max_model_len=None, num_blocks=None))
    info = worker.load()
    assert len(info.content) == 32
    assert replace(info, content="") == WorkerInfo(
        architecture="Gemma2ForCausalLM",
        device="cpu",
        dtype="float32",
        num_parameters=model.num_parameters(),
        vocab_size=128,
        max_model_len=MAX_POSITION,
        kv_bytes_per_token=2 * 2 * 2 * 16 * 4,
        max_num_batched_tokens=16,
        is_asynchronous=False,
        eos_token_ids=(2,),
        embedding=NO_LAYOUT,
        can_generate=True,
        source_format="safetensors float32",
        computed_format="float32",
        weight_bytes=4 * model.num_parameters(),
        group_windows=(None, WINDOW),
        group_layers=(1, 1),
    )
    windowed = 8 * (-(-WINDOW // 16) + 2) + 16 // 16
    assert worker.profile() == 8 * MAX_POSITION // 16 + windowed


def test_a_cache_for_less_than_one_sequence_stops_the_start(gemma2: tuple[Path, Any]) -> None:
    worker = Worker(make_config(gemma2[0], num_blocks=None, kv_cache_memory_bytes=2**15))
    worker.load()
    with pytest.raises(ConfigurationError, match="--max-model-len 48 "):
        worker.profile()


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3"])
def test_float8_caches_need_a_gpu(gemma2: tuple[Path, Any], dtype: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{dtype} needs a GPU"):
        Worker(make_config(gemma2[0], kv_cache_dtype=dtype)).load()


def test_unknown_cache_dtypes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'fp8_e5m2'"):
        make_config(Path("none"), kv_cache_dtype="fp8_e5m2")


def test_the_dtype_of_a_float8_cache_is_reported(gemma2: tuple[Path, Any]) -> None:
    info = Worker(make_config(gemma2[0], kv_cache_dtype="fp8"), CudaOnCpuBackend()).load()
    assert (info.dtype, info.kv_cache_dtype) == ("float32", "float8_e4m3fn")
    assert info.kv_bytes_per_token == 2 * 2 * 2 * 16


def test_the_number_of_threads_is_configured_or_chosen(
    gemma2: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Worker(make_config(gemma2[0], num_threads=2)).load()
    assert torch.get_num_threads() == 2
    usable = len(os.sched_getaffinity(0))
    with pytest.raises(ConfigurationError, match=f"--num-threads is {usable + 1}, .* {usable} CPU"):
        Worker(make_config(gemma2[0], num_threads=usable + 1)).load()
    torch.set_num_threads(usable + 3)  # as by OMP_NUM_THREADS
    monkeypatch.setenv("OMP_NUM_THREADS", str(usable + 3))
    Worker(make_config(gemma2[0], num_threads=None)).load()
    assert torch.get_num_threads() == usable
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = default_num_threads()
    assert cores is None or 1 <= cores <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_num_threads() is None


def test_out_of_memory_is_reported_and_the_step_can_be_retried(
    gemma2: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = gemma2
    driver = Driver.start(make_config(folder))
    sequence = make_sequence([5, 6, 7, 8], 6)
    driver.step([sequence])
    runner = driver.worker._runner
    run_model = runner._run_model

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    output = driver.schedule([sequence])
    monkeypatch.setattr(runner, "_run_model", fail)
    with pytest.raises(DeviceMemoryError):
        driver.launch(output)
    monkeypatch.setattr(runner, "_run_model", run_model)
    result = driver.launch(output)
    assert [*sequence.token_ids[4:], *result.token_ids] == generate(model, [5, 6, 7, 8], 2)


def test_the_cuda_path_passes_its_kernels_the_right_rows(gemma2: tuple[Path, Any]) -> None:
    folder, model = gemma2
    driver = Driver.start(make_config(folder), CudaOnCpuBackend())
    runner = driver.worker._runner
    before = runner._kv_cache.normal_().clone()
    compile_kernels(runner)
    runner.run_largest_step()
    assert torch.equal(runner._kv_cache, before)
    prompts = [[5, 6, 7], list(range(3, 40)), [9]]
    outputs = driver.run([make_sequence(prompt, 6) for prompt in prompts])
    assert outputs == [generate(model, prompt, 6) for prompt in prompts]
    assert driver.mixed_steps > 0


def test_a_kernel_that_does_not_run_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher may refuse it, Triton may fail to compile it, or it may lack resources."""
    from triton.runtime.errors import OutOfResources

    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    errors = [
        (ValueError("head_dim must be\n16 to 256"), UnsupportedModelError, "must be 16 to 256"),
        (OutOfResources(300_000, 232_448, "shared memory"), UnsupportedModelError, "232448"),
        (torch.OutOfMemoryError("CUDA out of memory"), ConfigurationError, "does not fit"),
    ]
    demand = CacheDemand(make_config(Path("none")), "Test", 1024, (None,), 128)
    for raised, expected, message in errors:

        def fail(num_blocks: int, raised: Exception = raised) -> Rehearsal:
            raise raised

        with pytest.raises(expected, match=message):
            CudaBackend().cache_memory(demand, fail)
