"""The CUDA path of the runner on the CPU: plain references in the kernels' place."""

from __future__ import annotations

import pytest
import torch

from quire.engine.attention import interface as attention
from quire.engine.devices.cuda import attention as attention_cuda
from quire.engine.devices.cuda import inputs as device_inputs
from quire.engine.devices.cuda.attention import attend_on_cuda
from quire.engine.devices.cuda.decode_graphs import Run
from quire.engine.model import loader
from quire.engine.model.causal_lm import CausalLM
from quire.engine.runner import input_batch, worker
from quire.engine.runner.model_runner import ModelRunner
from quire.kernels import reference
from quire.kernels.cuda import copy_blocks


def use_cuda_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Triton's interpreter runs the kernels that this calls."""
    monkeypatch.setattr(attention, "_backend", lambda device: attend_on_cuda)
    monkeypatch.setattr(CausalLM, "_prepare_cpu", lambda *_: None)
    monkeypatch.setattr(input_batch, "_has_kernel", lambda device: True)
    resolve = loader.resolve_kv_cache_dtype
    for module in (loader, worker):
        monkeypatch.setattr(
            module,
            "resolve_kv_cache_dtype",
            lambda config, dtype, device: resolve(config, dtype, torch.device("cuda")),
        )


def use_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a plain reference for each kernel."""
    use_cuda_path(monkeypatch)
    for name in vars(reference):
        if hasattr(attention_cuda, name) and not name.startswith("_") and name != "torch":
            monkeypatch.setattr(attention_cuda, name, getattr(reference, name))
    monkeypatch.setattr(copy_blocks, "copy_blocks", reference.copy_blocks)
    monkeypatch.setattr(device_inputs, "prepare_inputs", reference.prepare_inputs)
    monkeypatch.setattr(
        attention_cuda, "build_decode_schedule", lambda seq_lens, workspace, prefix_lens: None
    )


def give_workspaces(runner: ModelRunner) -> None:
    """The references look at none; there must only be one for each window."""
    runner._workspaces = dict.fromkeys(runner._windows)  # type: ignore[arg-type]


class RerunCapture:
    """A capture without CUDA: a replay runs the same again, over the same static tensors."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, run: Run) -> Run:
        def replay() -> None:
            self.num_replays += 1
            run()

        return replay
