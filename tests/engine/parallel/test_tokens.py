"""Several ranks give what one gives: tokens, log-probabilities, embeddings, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.engine.devices.cuda.step_graphs import graph_sizes
from quire.engine.request import Pooling, Request

from .. import models
from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..sentence_transformers_layout import edit_json
from ..speculation.drafters import FreeDrafts
from ..test_oracle import Engine, prompts, summary
from .thread_ranks import ParallelEngine

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "qwen2": {},  # biases
    "qwen3": {"vocab_size": 126},  # norms of Q and K; a tied head whose rows do not divide
    "mistral": {},  # windows
    "gemma3": {"num_key_value_heads": 1},  # one KV head for all ranks
    "mixtral": {},  # experts
    "olmo2": {},  # norms of all of Q and of all of K
}

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.9, "seed": 7, "top_p": 0.8, "top_k": 20},
    {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"logprobs": 3, "prompt_logprobs": 2, "logprob_token_ids": (5, 17)},
    {"temperature": 0.7, "seed": 2, "n": 3},
    {"beam_width": 3, "n": 2, "logprobs": 1},
    {"logit_bias": ((7, 3.0),), "bad_words": ((9,), (7, 8))},
]

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked and preempted": {"num_blocks": 14, "max_num_batched_tokens": 16},
    "ahead": {"async_scheduling": True, "num_blocks": 14, "max_num_batched_tokens": 64},
    "drafts": {"speculation": "ngram", "enable_prefix_caching": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family, changes in FAMILIES.items():
        config = models.FAMILIES[family]()
        for name, value in changes.items():
            setattr(config, name, value)
        made[family] = tmp_path_factory.mktemp(family)
        models.build_model(config).save_pretrained(made[family])
    return made


def run_all(engine: Engine, rounds: int = 1) -> list[Any]:
    """Return what clients get of requests of all kinds, run together."""
    given = prompts(2 * len(KINDS), longest=60)
    requests: list[Request] = []
    for _ in range(rounds):
        for index, prompt in enumerate(given):
            kind = KINDS[index % len(KINDS)]
            requests.append(engine.add(prompt, 5 + index, **kind))
        engine.run()
    return [summary(engine, request) for request in requests]


_alone: dict[tuple[str, str], list[Any]] = {}


def alone(folders: dict[str, Path], family: str, mode: str) -> list[Any]:
    if (family, mode) not in _alone:
        _alone[family, mode] = run_all(Engine(folders[family], **MODES[mode]), 2)
    return _alone[family, mode]


@pytest.mark.parametrize(
    ("family", "size"),
    [*((family, 2) for family in FAMILIES), ("llama", 4), ("gemma3", 4), ("olmo2", 4)],
)
def test_every_family_gives_the_same(folders: dict[str, Path], family: str, size: int) -> None:
    with ParallelEngine(folders[family], tensor_parallel_size=size) as engine:
        assert run_all(engine, 2) == alone(folders, family, "plain")
        stats = engine.core.stats()
        assert stats.prefix_hits and stats.blocks_copied
        plans = engine.ranks[0].plans
        assert any(plan.copies for plan in plans) and any(plan.extra_logits for plan in plans)


@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_every_way_to_run_gives_the_same(folders: dict[str, Path], mode: str) -> None:
    with ParallelEngine(folders["qwen3"], tensor_parallel_size=2, **MODES[mode]) as engine:
        drafting = engine.core._scheduler._drafting
        if drafting is not None:
            drafting.speculator.cost = FreeDrafts()  # a busy machine's steps may not be worth any
        assert run_all(engine, 2) == alone(folders, "qwen3", mode)
        assert (engine.core.stats().preemptions > 0) == ("num_blocks" in MODES[mode])
        assert any(plan.has_drafts for plan in engine.ranks[0].plans) == (mode == "drafts")


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_the_code_for_gpus_gives_the_same(folders: dict[str, Path], family: str) -> None:
    """Flat layers, decode graphs and tokens that are fed back, with references of the kernels."""

    def backend() -> CudaOnCpuBackend:
        return CudaOnCpuBackend(sizes=graph_sizes(8))

    config: dict[str, Any] = {"async_scheduling": True, "max_num_seqs": 8}
    with ParallelEngine(folders[family], backend, tensor_parallel_size=2, **config) as engine:
        got = run_all(engine)
        assert engine.worker._runner.num_graphs
        assert any(plan.num_fed_back for plan in engine.ranks[0].plans)
    assert got == run_all(Engine(folders[family], CudaOnCpuBackend(), **config))


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama", (1, 2)), ("gemma3", (1, 3)), ("qwen3", (2, 2)), ("mixtral", (1, 2))],
)
def test_stages_give_the_same(
    folders: dict[str, Path], family: str, sizes: tuple[int, int]
) -> None:
    """Gemma's three layers have windows and not, in stages of their own."""
    tensor, stages = sizes
    config = {"tensor_parallel_size": tensor, "pipeline_parallel_size": stages}
    with ParallelEngine(folders[family], **config) as engine:
        assert run_all(engine, 2) == alone(folders, family, "plain")


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)], ids=str)
def test_embeddings_and_scores_are_the_same(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Scores ask the head for logits that no sample needs."""
    models.save_model("qwen3", tmp_path)
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.LogitScore", "path": "1_LogitScore"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    edit_json(tmp_path / "1_LogitScore/config.json", true_token_id=5, false_token_id=9)
    config: dict[str, Any] = {"max_num_batched_tokens": 16}
    kinds: tuple[Pooling, ...] = ("last", "mean", "max", "classify")

    def run(engine: Engine) -> list[list[float]]:
        requests = [
            engine.add(prompt, 0, pooling=kinds[index % 4], temperature=1.0, ignore_eos=False)
            for index, prompt in enumerate(prompts(12))
        ]
        generated = engine.add(prompts(3)[2], 9)
        engine.run()
        vectors = [engine.outputs[one.request_id, 0][-1].embedding for one in requests]
        found = [np.frombuffer(vector or b"", dtype="<f4").tolist() for vector in vectors]
        return [*found, [float(token) for token in engine.tokens(generated)]]

    expected = run(Engine(tmp_path, **config))
    tensor, stages = shape
    config |= {"tensor_parallel_size": tensor, "pipeline_parallel_size": stages}
    with ParallelEngine(tmp_path, **config) as engine:
        assert run(engine) == [pytest.approx(vector, abs=1e-4) for vector in expected]


def test_random_weights_are_those_of_one_rank(folders: dict[str, Path]) -> None:
    config: dict[str, Any] = {"load_format": "dummy", "seed": 3}
    wanted = Engine(folders["llama"], **config).complete(prompts(2)[1], 9)
    with ParallelEngine(folders["llama"], tensor_parallel_size=2, **config) as engine:
        assert engine.complete(prompts(2)[1], 9) == wanted
