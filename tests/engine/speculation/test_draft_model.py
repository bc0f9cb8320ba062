"""A real engine with a draft model: the same answers, and a cache that holds for both models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire.engine.core.engine_core import EngineCore
from quire.engine.request import Request
from quire.engine.runner.worker import Worker
from quire.engine.sampling_params import SamplingParams
from quire.engine.speculation.model import ModelDrafter
from quire.engine.speculation.speculator import SpeculationCounts, Speculator

from ..models import save_model
from ..worker_driver import make_config
from .drafters import FreeDrafts
from .test_exactness import _content, _requests, _run

OPTIONS = {"num_blocks": 80, "max_num_batched_tokens": 64, "max_model_len": 256}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a model, and of others with its vocabulary."""
    root = tmp_path_factory.mktemp("models")
    for name, family, seed in (("served", "llama", 0), ("other", "qwen3", 7)):
        save_model(family, root / name, seed)
    return {name: root / name for name in ("served", "other")}


def make_core(folder: Path, draft: Path | None, max_draft: int = 7, **fields: Any) -> EngineCore:
    """Return an engine; with a draft model, every draft is one of that model's."""
    drafted = {"speculation": "off"} if draft is None else {"speculative_model": str(draft)}
    config = make_config(folder, **OPTIONS | drafted | fields)
    core = EngineCore(config, Worker(config))
    drafting = core._scheduler._drafting
    if drafting is not None:
        drafting.speculator = Speculator(
            [], max_draft=max_draft, max_samples=64, cost=FreeDrafts(), model=ModelDrafter()
        )
    return core


def counts_of(core: EngineCore) -> SpeculationCounts:
    drafting = core._scheduler._drafting
    assert drafting is not None
    return drafting.speculator.counts


@pytest.mark.parametrize("draft", ["served", "other"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_blocks": 16, "max_num_seqs": 6},
        {"max_num_batched_tokens": 9},
        {"async_scheduling": True},
        {"quantization": "int8"},
        {"quantization": "int4"},
    ],
    ids=str,
)
def test_answers_are_those_without_it(
    folders: dict[str, Path], draft: str, fields: dict[str, Any]
) -> None:
    """Under every kind of sampling, in small pools, under small budgets, one step ahead, in 8 and 4
    bits: whether the draft model is right or random."""
    requests = _requests(1)
    plain = make_core(folders["served"], None, **fields)
    expected = {key: _content(answer) for key, answer in _run(plain, requests).items()}
    drafted = make_core(folders["served"], folders[draft], **fields)
    found = {key: _content(answer) for key, answer in _run(drafted, requests).items()}
    assert found == expected
    counts = counts_of(drafted)
    assert counts.num_drafts > 10
    if draft == "served":
        assert counts.accepted_tokens > 0.8 * counts.draft_tokens  # not all know the penalties


def _stateless(seed: int) -> list[Request]:
    """Return requests whose draws depend on nothing but the logits."""
    sampling: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 9, "logit_bias": ((5, 4.0),), "n": 3},
        {"temperature": 1.0, "min_tokens": 8, "stop_token_ids": (17, 23)},
    ]
    return [
        replace(
            request,
            request_id=f"s{seed}-{index}",
            sampling_params=SamplingParams(max_tokens=30, seed=index, **sampling[index % 4]),
        )
        for index, request in enumerate(_requests(seed))
    ]


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_blocks": 17, "max_num_seqs": 6}, {"max_num_batched_tokens": 11}, {"block_size": 32}],
    ids=str,
)
def test_the_served_model_as_its_own_draft_is_always_right(
    folders: dict[str, Path], fields: dict[str, Any]
) -> None:
    """One wrong guess would show a slot whose K and V the draft model has not computed: after a
    preemption, a prefix hit, a copy, a fork, a chunk, or a draft that was cut short."""
    core = make_core(folders["served"], folders["served"], **fields)
    for seed in range(3):  # the later ones find prefixes of the first
        _run(core, _stateless(seed % 2))
    counts = counts_of(core)
    assert counts.draft_tokens > 100
    assert counts.accepted_tokens == counts.draft_tokens
    stats = core.stats()
    assert stats.prefix_hits > 0 and stats.blocks_copied > 0
    if "num_blocks" in fields:
        assert stats.preemptions > 0
