"""Compare models whose layers have windows with Hugging Face, over contexts of many windows.

Whatever is chunked, preempted, shared, forked or batched, and whichever blocks were given back
behind windows and used again, the tokens are those of `generate`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config

from quire.engine.devices.cpu.decoder import CpuDecoder
from quire.engine.devices.cuda.decode_graphs import graph_sizes

from . import models
from .devices.cuda_on_cpu import CudaOnCpuBackend
from .models import COMMON, MAX_POSITION, WINDOW
from .test_oracle import Engine, Reference

SHAPES: dict[str, Callable[[], Any]] = {
    # One table of a window of its own.
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=WINDOW),
    # Two groups of two layers, with sinks.
    "gpt_oss": lambda: GptOssConfig(
        **COMMON | {"num_hidden_layers": 4},
        head_dim=16,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # A group of one full layer, which leaves a place empty, and four of two windowed ones.
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON | {"num_hidden_layers": 9},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * 8 + ["full_attention"],
    ),
    # Layers that run as one compiled function.
    "qwen2": lambda: Qwen2Config(
        **COMMON | {"num_hidden_layers": 4},
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
}
GROUPS = {"mistral": 1, "gpt_oss": 2, "gemma3": 5, "qwen2": 4}
SMALL: dict[str, Any] = {"num_blocks": 0, "max_num_batched_tokens": 48}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 16},
    "preempted": {**SMALL},
    "preempted-uncached": {**SMALL, "enable_prefix_caching": False},
    "preempted-ahead": {**SMALL, "async_scheduling": True},
    "blocks-of-64": {"block_size": 64, "num_blocks": 64, "max_num_batched_tokens": 40},
    "drafts": {"speculation": "ngram"},
}


@pytest.fixture(scope="module", params=list(SHAPES))
def shape(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Reference]]:
    folder = tmp_path_factory.mktemp(request.param)
    model = models.build_model(SHAPES[request.param]())
    model.save_pretrained(folder)
    yield request.param, folder, Reference(model)


def make_engine(folder: Path, backend: Any = None, **config: Any) -> Engine:
    """Start an engine in whose cache nothing is a number, but for the null block."""
    engine = Engine(folder, backend, **{"max_model_len": MAX_POSITION} | config)
    cache = engine.worker._runner._kv_cache
    assert cache.shape[2] == engine.core.info.num_blocks + 1
    cache[:, :, :-1] = torch.nan
    return engine


def wanted(count: int = 10) -> list[tuple[list[int], int]]:
    """Return prompts and numbers of tokens; half of the prompts have a long common beginning."""
    rng = random.Random(11)
    stem = [rng.randrange(3, models.VOCAB_SIZE) for _ in range(180)]
    made = []
    for i in range(count):
        shared = stem[: rng.randrange(60, 180)] if i % 2 else []
        own = [rng.randrange(3, models.VOCAB_SIZE) for _ in range(rng.randrange(1, 40))]
        made.append((shared + own, rng.randrange(5, 36)))
    return made


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_equal_generate(shape: tuple[str, Path, Reference], mode: str) -> None:
    """Ten requests run at once, then again with what is left of their prefixes."""
    name, folder, reference = shape
    engine = make_engine(folder, **MODES[mode])
    assert len(engine.core.info.group_windows) == GROUPS[name]
    for _ in range(2):
        requests = [engine.add(prompt, max_tokens) for prompt, max_tokens in wanted()]
        engine.run()
        for request, (prompt, max_tokens) in zip(requests, wanted(), strict=True):
            assert engine.tokens(request) == reference.complete(prompt, max_tokens)
    stats = engine.core.stats()
    assert (stats.preemptions > 0) == mode.startswith("preempted")
    if not mode.startswith("preempted"):
        assert stats.prefix_hits > 300
    assert stats.accepted_tokens > 0 or mode != "drafts"
    cache = engine.worker._runner._kv_cache
    assert not cache[:, :, -1].any()  # the null block was never written


def test_forks_equal_generate(shape: tuple[str, Path, Reference]) -> None:
    _, folder, reference = shape
    for sizes in ({}, {**SMALL, "async_scheduling": True}):
        engine = make_engine(folder, **sizes)
        prompt, _ = wanted()[1]
        request = engine.add(prompt, 40, n=4)
        engine.run()
        for choice in range(4):
            assert engine.tokens(request, choice) == reference.complete(prompt, 40)


def test_decode_graphs_equal_generate(shape: tuple[str, Path, Reference]) -> None:
    """On the CUDA backend, each group has slots and tables at fixed addresses."""
    _, folder, reference = shape
    backend = CudaOnCpuBackend(sizes=graph_sizes(6))
    engine = make_engine(
        folder, backend, async_scheduling=True, max_num_seqs=6, max_num_batched_tokens=64
    )
    requests = [engine.add(prompt, max_tokens) for prompt, max_tokens in wanted()]
    engine.run()
    for request, (prompt, max_tokens) in zip(requests, wanted(), strict=True):
        assert engine.tokens(request) == reference.complete(prompt, max_tokens)
    assert backend.reruns.num_replays > 15


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_small_caches_decode_as_the_sequence_alone(
    shape: tuple[str, Path, Reference], dtype: str
) -> None:
    """The rounding depends on the token only, so company and preemption change nothing."""
    name, folder, _ = shape
    if name == "gpt_oss":
        pytest.skip("its experts run for several tokens at once, whose products round otherwise")
    alone = Engine(folder, kv_cache_dtype=dtype, max_model_len=MAX_POSITION)
    crowd = Engine(folder, kv_cache_dtype=dtype, max_model_len=MAX_POSITION, **SMALL)
    requests = [crowd.add(prompt, max_tokens) for prompt, max_tokens in wanted(6)]
    crowd.run()
    for request, (prompt, max_tokens) in zip(requests, wanted(6), strict=True):
        assert crowd.tokens(request) == alone.complete(prompt, max_tokens)


def test_qwen2_runs_as_one_compiled_function(tmp_path: Path) -> None:
    models.build_model(SHAPES["qwen2"]()).save_pretrained(tmp_path)
    engine = Engine(tmp_path)
    assert isinstance(engine.worker._model._body, CpuDecoder)
