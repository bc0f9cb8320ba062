"""With --deterministic, answers in a crowd are those that each request gets alone, to the bit.

`make determinism` compares ten thousand requests; these are a few on the bodies that differ most.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quire.engine.core.engine_core import EngineCore
from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.errors import ConfigurationError
from quire.engine.model.loader import load_model
from quire.engine.runner.worker import Worker

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..models import save_model
from ..worker_driver import load, make_config
from . import crowd
from .bodies import ADAPTED, COMPILED, GENERIC
from .crowd import Body, alone, differences, make_requests

BODIES = {body.name: body for body in (*COMPILED, *GENERIC, *ADAPTED)}


@pytest.mark.parametrize(
    ("name", "is_compiled", "num_requests"),
    [("qwen3, float16 cache", True, 20), ("gemma2", False, 8), ("qwen3_moe, LoRA", False, 8)],
)
def test_a_crowd_changes_no_bit(
    name: str, is_compiled: bool, num_requests: int, tmp_path: Path
) -> None:
    body = BODIES[name]
    body.save(tmp_path)
    assert list(differences(body, tmp_path, num_requests, seed=3, deterministic=True)) == []
    config = body.config(tmp_path, deterministic=True)
    model = load_model(config, CpuBackend())
    assert model.runs_tokens_alone != is_compiled
    assert model.is_batch_invariant


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that finds nothing proves nothing unless it finds one bit."""
    body = BODIES["llama"]
    body.save(tmp_path)
    crowded = crowd.crowded

    def one_bit(core: EngineCore, requests: list[crowd.Request], seed: int) -> crowd.Answers:
        answers = crowded(core, requests, seed)
        key, said = next(iter(answers.items()))
        first, *others = said.logprobs
        value = torch.tensor(first.logprob)
        nearest = torch.nextafter(value, value + 1).item()
        answers[key] = said._replace(logprobs=(first._replace(logprob=nearest), *others))
        return answers

    monkeypatch.setattr(crowd, "crowded", one_bit)
    assert len(list(differences(body, tmp_path, 4, seed=1))) == 2  # one for each engine


def test_tokens_one_at_a_time_are_those_of_whole_steps(tmp_path: Path) -> None:
    """Computing tokens alone changes nothing but the last bits."""
    save_model("gemma2", tmp_path)
    body = Body("gemma2", lambda folder: None, {})
    requests = make_requests(5, 6)
    answers = []
    for deterministic in (False, True):
        config = body.config(tmp_path, deterministic=deterministic, num_blocks=64)
        answers.append(alone(EngineCore(config, Worker(config)), requests))
    for key, said in answers[0].items():
        assert answers[1][key].token_ids == said.token_ids
        for one, other in zip(said.logprobs, answers[1][key].logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_only_who_asks_computes_tokens_one_at_a_time(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    assert not load(tmp_path).runs_tokens_alone
    assert not load(tmp_path).is_batch_invariant


def test_a_gpu_refuses_before_it_loads_anything(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = make_config(tmp_path, deterministic=True)
    with pytest.raises(ConfigurationError, match="--deterministic works only on the CPU"):
        load_model(config, CudaOnCpuBackend())
