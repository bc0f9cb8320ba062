"""Test decode graphs without CUDA: padding, static inputs, stale rows and the choice of a size."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import PreTrainedModel

from quire.engine.devices.cuda.attention import CudaPlanner
from quire.engine.devices.cuda.step_graphs import CudaCapture, NotCapturableError, Run, graph_sizes
from quire.engine.devices.steps import GraphKey
from quire.engine.errors import ConfigurationError

from ..models import FAMILIES, generate, logprobs, save_model
from ..worker_driver import Driver, make_config, make_prompts, make_sequence
from .cuda_on_cpu import CudaOnCpuBackend

SIZES = [1, 2, 4, 8]
PROMPT_LENGTHS = [1, 5, 16, 17, 40, 61]


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    return tmp_path, save_model(request.param, tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    return tmp_path, save_model("llama", tmp_path)


def start(folder: Path, backend: CudaOnCpuBackend, **config: Any) -> Driver:
    driver = Driver.start(make_config(folder, **config), backend)
    assert not driver.worker._runner._kv_cache.any()  # no capture has written anything
    return driver


def test_the_ladder_ends_with_the_largest_step() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(16) == [1, 2, 4, 8, 16]
    assert graph_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert len(graph_sizes(256)) == 35
    assert graph_sizes(1000) == graph_sizes(256)


def test_replayed_steps_give_the_reference_tokens(
    family: tuple[Path, PreTrainedModel],
) -> None:
    """Rows finish one by one, so every size is used, with stale rows past the live ones."""
    folder, model = family
    backend = CudaOnCpuBackend(sizes=SIZES)
    driver = start(folder, backend)
    prompts = make_prompts(PROMPT_LENGTHS)
    lengths = [4 + 3 * i for i in range(len(prompts))]
    outputs = driver.run(
        [make_sequence(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    )
    for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
        assert output == generate(model, prompt, length)
    assert 10 < backend.reruns.num_replays < driver.steps
    assert driver.worker._runner._kv_cache[:, :, 0].count_nonzero() == 0  # block 0 stays unused


def test_a_replayed_row_need_not_sample(
    llama: tuple[Path, PreTrainedModel],
) -> None:
    """A prompt advances by single tokens next to decoding rows, with log-probabilities."""
    folder, model = llama
    backend = CudaOnCpuBackend(sizes=SIZES)
    driver = start(folder, backend, max_num_batched_tokens=3)
    sequences = [
        make_sequence(prompt, 12, logprobs=0, prompt_logprobs=0) for prompt in make_prompts([2, 9])
    ]
    driver.run(sequences)
    assert backend.reruns.num_replays > 8
    for sequence in sequences:
        expected = logprobs(model, sequence.token_ids)
        got = driver.prompt_logprobs[sequence.seq_id] + driver.logprobs[sequence.seq_id]
        want = [expected[i, token].item() for i, token in enumerate(sequence.token_ids[1:])]
        assert [entry.logprob for entry in got] == pytest.approx(want, abs=1e-4)


def test_more_rows_than_the_largest_graph_run_without_graphs(
    llama: tuple[Path, PreTrainedModel],
) -> None:
    folder, model = llama
    backend = CudaOnCpuBackend(sizes=[1, 2])
    driver = start(folder, backend, max_num_batched_tokens=64)
    prompts = make_prompts([3, 4, 5])
    outputs = driver.run([make_sequence(prompt, 5) for prompt in prompts])
    assert outputs == [generate(model, prompt, 5) for prompt in prompts]
    assert backend.reruns.num_replays == 0


def test_shared_prefixes_have_their_own_graphs_from_four_rows_on(
    llama: tuple[Path, PreTrainedModel],
) -> None:
    runner = start(llama[0], CudaOnCpuBackend(sizes=SIZES)).worker._runner
    graphs = runner._graphs
    assert graphs is not None and all(GraphKey(size, False) in graphs for size in SIZES)
    assert [size for size in SIZES if GraphKey(size, True) in graphs] == [4, 8]


@pytest.mark.parametrize("disabled", [False, True])
def test_cascades_can_be_disabled(llama: tuple[Path, PreTrainedModel], disabled: bool) -> None:
    driver = start(llama[0], CudaOnCpuBackend(), disable_cascade_attn=disabled)
    planner = driver.worker._runner.planner
    assert isinstance(planner, CudaPlanner)
    assert (planner.shared_prefixes is None) == disabled


def test_a_model_that_waits_for_the_device_runs_without_graphs(
    llama: tuple[Path, PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Run) -> Run:
        raise NotCapturableError("called a synchronizing operation")

    folder, model = llama
    driver = start(folder, CudaOnCpuBackend(sizes=SIZES, capture=refuse))
    assert "decode steps run without CUDA graphs: called a synchronizing" in caplog.text
    prompt = make_prompts([7])[0]
    assert driver.run([make_sequence(prompt, 5)]) == [generate(model, prompt, 5)]


def test_a_failed_capture_stops_the_start(llama: tuple[Path, PreTrainedModel]) -> None:
    def fail(_: Run) -> Run:
        raise RuntimeError("CUDA error:\nout of resources")

    with pytest.raises(ConfigurationError, match="RuntimeError: CUDA error: out of .* --enforce-e"):
        start(llama[0], CudaOnCpuBackend(sizes=SIZES, capture=fail))


class FakeCuda:
    """Record the calls of a capture to torch.cuda; with `syncs`, a run waits for the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.mode, self.syncs = "default", False
        for name in ("graph_pool_handle", "current_stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())
        for name in ("Stream", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, partial(self.record, name))
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)

    def record(self, name: str, *_: Any, **__: Any) -> MagicMock:
        self.calls.append(name)
        return MagicMock()

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def run(self) -> None:
        self.calls.append(f"run {self.mode}")
        if self.syncs and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


def test_a_capture_warms_up_then_checks_for_waits_then_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of this happens on one stream, because cuBLAS keeps a workspace for each stream."""
    cuda = FakeCuda(monkeypatch)
    capture = CudaCapture(torch.device("cuda"))
    one = ["stream", "run default", "run error", "graph", "run default"]
    for _ in range(2):
        capture(cuda.run)
    assert cuda.calls == ["Stream", *one, *one]
    cuda.syncs = True
    with pytest.raises(NotCapturableError, match="synchronizing"):
        capture(cuda.run)
    assert cuda.mode == "default" and "graph" not in cuda.calls[11:]
