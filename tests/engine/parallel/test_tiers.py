"""Every rank keeps its part of evicted blocks, in the slots that rank 0 names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigurationError
from quire.engine.parallel.step_plan import make_plan
from quire.engine.step import BlockLoad, BlockSave

from .. import models
from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..random_steps import make_output
from ..test_oracle import Reference
from ..tiers.test_tier_oracle import BLOCK_BYTES, conversations, hold
from .thread_ranks import ParallelEngine


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Reference]]:
    folder = tmp_path_factory.mktemp("llama")
    yield folder, Reference(models.save_model("llama", folder))


def engine_of(folder: Path, make_backend: Any = None, **config: Any) -> ParallelEngine:
    """Return an engine whose cache has room for one conversation, and whose host memory for all."""
    values = {"num_blocks": 12, "max_num_batched_tokens": 48} | config
    made = ParallelEngine(folder, make_backend, **{"kv_offloading_size": 64 * BLOCK_BYTES} | values)
    tier = made.core._tier
    assert tier is not None
    tier.cost.observe_step = lambda tokens, seconds: None  # type: ignore[method-assign]
    return made


SHAPES = [(2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("size", "stages"), SHAPES)
def test_conversations_come_back_on_all_ranks(
    llama: tuple[Path, Reference], size: int, stages: int
) -> None:
    folder, reference = llama
    shape = {"tensor_parallel_size": size, "pipeline_parallel_size": stages}
    with engine_of(folder, async_scheduling=stages == 1, **shape) as engine:
        assert hold(engine, reference) >= 3 * (32 + 80)
        (tier,) = engine.core.stats().tiers
        assert tier.stored > 0 and tier.loaded > 0 and tier.max_blocks == 64
        # Each rank's slots hold what its own cache held: together the bytes of whole blocks.
        workers = [engine.worker, *engine.followers.values()]
        parts = [worker._runner.host_blocks._parts[0].slots for worker in workers]
        assert sum(part[0].nbytes for part in parts) == BLOCK_BYTES
        assert all(len(part) == 64 and part.any() for part in parts)


def test_ranks_that_share_a_head_take_more_memory(llama: tuple[Path, Reference]) -> None:
    """Four ranks have one of two heads each, so a block takes twice as much in all."""
    folder, reference = llama
    with engine_of(folder, tensor_parallel_size=4) as engine:
        assert hold(engine, reference) > 0
        (tier,) = engine.core.stats().tiers
        assert tier.max_blocks == 32 and tier.loaded > 0


def test_preempted_sequences_are_swapped(llama: tuple[Path, Reference]) -> None:
    folder, reference = llama
    with engine_of(folder, tensor_parallel_size=2, num_blocks=14) as engine:
        talks = [prompts[1] for prompts in conversations()]
        requests = [engine.add(prompt, 60) for prompt in talks]
        engine.run()
        for prompt, request in zip(talks, requests, strict=True):
            assert engine.tokens(request) == reference.complete(prompt, 60)
        stats = engine.core.stats()
        assert stats.preemptions and stats.tiers[0].loaded


def test_the_code_for_gpus_brings_blocks_back(llama: tuple[Path, Reference]) -> None:
    folder, reference = llama
    config: dict[str, Any] = {"max_num_seqs": 8, "async_scheduling": True}
    with engine_of(folder, CudaOnCpuBackend, tensor_parallel_size=2, **config) as engine:
        assert hold(engine, reference) > 0 and engine.core.stats().tiers[0].loaded > 0


def test_a_plan_of_copies_alone_has_no_rows() -> None:
    output = make_output([])._replace(
        block_saves=[BlockSave(3, 1)], block_loads=[BlockLoad(1, 4), BlockLoad(0, 2)]
    )
    assert output.begins_with_copies
    plan = make_plan(output, None, np.empty(0, np.int64), [], extra_logits=[], num_fed_back=0)
    assert (plan.num_seqs, plan.saves, plan.loads) == (0, [(3, 1)], [(1, 4), (0, 2)])


@pytest.mark.parametrize("below", ["disk", "connector"])
@pytest.mark.parametrize("shape", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_stores_below_host_memory_are_refused(below: str, shape: str) -> None:
    fields: dict[str, Any] = {shape: 2, f"kv_offloading_{below}": "somewhere"}
    with pytest.raises(ConfigurationError, match=f"^--kv-offloading-{below} works only with"):
        EngineConfig(model="m", kv_offloading_size=2**20, **fields)


def test_a_follower_without_memory_says_so(
    llama: tuple[Path, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host may have less than rank 0's."""
    with engine_of(llama[0], tensor_parallel_size=2) as engine:
        monkeypatch.setattr("quire.engine.runner.worker.available_memory", lambda: 1000)
        with pytest.raises(ConfigurationError, match="^this rank's part of --kv-offloading-size"):
            engine.followers[1].hold_blocks(64)
