"""The CUDA path of the runner on the CPU: plain references in the kernels' place."""

from __future__ import annotations

from functools import partial

import pytest

from quire.engine import attention
from quire.engine.attention import attend_flat
from quire.engine.causal_lm import CausalLM
from quire.engine.decode_graphs import Run
from quire.engine.flat_decoder import TorchOps
from quire.engine.model_runner import ModelRunner
from quire.kernels import (
    decode_schedule,
    paged_attention_decode,
    paged_attention_extend,
    reference,
    reshape_and_cache,
)


def use_references(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (paged_attention_decode, paged_attention_extend, reshape_and_cache):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, name, getattr(reference, name))
    monkeypatch.setattr(decode_schedule, "build_decode_schedule", lambda seq_lens, workspace: None)
    monkeypatch.setattr(attention, "_backend", lambda device: attention.attend_on_cuda)
    monkeypatch.setattr(
        CausalLM, "_body_ops", lambda _, metadata: TorchOps(partial(attend_flat, metadata))
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
