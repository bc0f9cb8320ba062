"""Compare models whose layers attend in chunks (Llama 4) with Hugging Face, over many chunks.

Whatever is chunked, preempted, shared, forked or batched, and whichever blocks of earlier chunks
were given back and used again, the tokens are those of `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama4 import (
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4VisionConfig,
)

from quire.engine.config import EngineConfig
from quire.engine.devices.cuda.step_graphs import graph_sizes
from quire.engine.errors import StartupError
from quire.engine.parallel.ranks import ALONE
from quire.engine.runner.worker import Worker

from . import models
from .devices.cuda_on_cpu import CudaOnCpuBackend
from .models import CHUNK, MAX_POSITION, llama4
from .parallel.thread_ranks import ParallelEngine
from .test_groups_oracle import MODES, SMALL, check, make_engine, wanted
from .test_oracle import Reference

GROUPS = (None, -CHUNK, -CHUNK)

SHAPES: dict[str, dict[str, Any]] = {
    "scout": {},
    # Two experts a token in all layers, no norm of Q and K, chunks that begin within blocks.
    "two experts": {
        "num_experts_per_tok": 2,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": False,
        "attention_chunk_size": 40,
    },
}


@pytest.fixture(scope="module", params=list(SHAPES))
def shape(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Reference]]:
    folder = tmp_path_factory.mktemp("llama4")
    model = models.build_model(llama4(**SHAPES[request.param]))
    model.save_pretrained(folder)
    yield folder, Reference(model)


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_equal_generate(shape: tuple[Path, Reference], mode: str) -> None:
    """Eight requests run at once, then again with what is left of their prefixes."""
    folder, reference = shape
    engine = make_engine(folder, **MODES[mode])
    assert len(engine.core.info.group_windows) == 3
    for _ in range(2):
        check(engine, reference)
    stats = engine.core.stats()
    assert (stats.preemptions > 0) == mode.startswith("preempted")
    if not mode.startswith("preempted"):
        assert stats.prefix_hits > 300
    cache = engine.worker._runner._kv_cache
    assert not cache[:, :, -1].any()  # the null block was never written


def test_many_at_once_and_forks_equal_generate(shape: tuple[Path, Reference]) -> None:
    folder, reference = shape
    engine = make_engine(folder, num_blocks=256)
    check(engine, reference, 32)
    for sizes in ({}, {**SMALL, "async_scheduling": True}):
        engine = make_engine(folder, **sizes)
        prompt, _ = wanted()[1]
        request = engine.add(prompt, 40, n=4)
        engine.run()
        for choice in range(4):
            assert engine.tokens(request, choice) == reference.complete(prompt, 40)


def test_decode_graphs_equal_generate(shape: tuple[Path, Reference]) -> None:
    folder, reference = shape
    backend = CudaOnCpuBackend(sizes=graph_sizes(6))
    engine = make_engine(
        folder, backend, async_scheduling=True, max_num_seqs=6, max_num_batched_tokens=64
    )
    check(engine, reference)
    assert backend.reruns.num_replays > 15


def test_stages_equal_generate(shape: tuple[Path, Reference]) -> None:
    """Each stage numbers its layers from 0, and knows what each of them does all the same."""
    folder, reference = shape
    sizes = {"max_model_len": MAX_POSITION, "max_num_batched_tokens": 48}
    with ParallelEngine(folder, pipeline_parallel_size=2, **sizes) as engine:
        check(engine, reference, 4)


def test_blocks_of_earlier_chunks_are_given_back(tmp_path: Path) -> None:
    models.build_model(llama4()).save_pretrained(tmp_path)
    engine = make_engine(tmp_path, max_num_batched_tokens=16)
    assert engine.core.info.group_windows == GROUPS
    engine.add(list(range(3, 103)), 60)
    pool, size, most = engine.core._scheduler.block_manager.pool, 16, 0
    while engine.core.has_work:
        engine.step()
        for sequence in engine.core._scheduler.running:
            for table in sequence.other_tables:
                held = sum(block != pool.num_blocks for block in table)
                most = max(most, held)
    # In time, a group holds a chunk and the tokens of a step.
    assert CHUNK // size <= most <= -(-(CHUNK + 16) // size) + 1


def test_the_text_of_the_multimodal_class_equals_generate(tmp_path: Path) -> None:
    vision = Llama4VisionConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vision_output_dim=16, projector_input_dim=16, projector_output_dim=16, image_size=28,
        patch_size=14,
    )  # fmt: skip
    config = Llama4Config(text_config=llama4().to_dict(), vision_config=vision.to_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Llama4ForConditionalGeneration._from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    model.save_pretrained(tmp_path)
    reference = Reference(model.language_model)
    engine = make_engine(tmp_path)
    assert engine.core.info.architecture == "Llama4ForConditionalGeneration"
    check(engine, reference, 3)


def test_what_llama4_does_not_go_with(shape: tuple[Path, Reference]) -> None:
    config = {"model": str(shape[0]), "device": "cpu", "tensor_parallel_size": 2}
    with pytest.raises(StartupError, match="tensor-parallel plan cuts .*experts"):
        Worker(EngineConfig(**config), ranks=ALONE).load()
