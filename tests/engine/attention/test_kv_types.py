"""Test caches of fewer bits than the model on the CPU: 16 bits, and int8 with a step a token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine.errors import ConfigurationError
from quire.engine.model import probe
from quire.engine.runner.worker import Worker

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..models import save_model
from ..test_oracle import Engine, prompts
from ..worker_driver import load, make_config
from .test_interface import HEADS, KV_HEADS, Batch, attend

TYPES = ["float16", "bfloat16", "int8"]
OPTIONS: list[dict[str, Any]] = [
    {"scale": 0.3, "window": None, "softcap": None, "sinks": None},
    {"scale": 0.3, "window": 24, "softcap": 3.0, "sinks": torch.zeros(HEADS)},
]


def rounded(part: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype != "int8":
        return part.to(getattr(torch, dtype)).float()
    steps = part.abs().amax(dim=-1, keepdim=True) / 127
    return (part / steps).round() * steps


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (64, 20)])
def test_attention_reads_what_was_rounded(
    block_size: int, head_dim: int, dtype: str, options: dict[str, Any]
) -> None:
    """Prompts of odd lengths, then a token each: all K and V go through the cache."""
    lengths = [2, 16, 40, 300]
    width = head_dim + 4 if dtype == "int8" else head_dim
    shape = (1, 2, 40, KV_HEADS, block_size, width)
    cache = torch.zeros(shape, dtype=getattr(torch, dtype))
    longer = [length + 1 for length in lengths]
    whole = Batch(longer, longer, block_size, head_dim)
    starts = [0, *torch.tensor(longer).cumsum(0).tolist()]
    last = [start - 1 for start in starts[1:]]
    first = [row for row in range(starts[-1]) if row not in last]
    wanted_key, wanted_value = whole.key, whole.value
    outputs = torch.empty_like(whole.query)
    for rows, counts, seq_lens in (
        (first, lengths, lengths),
        (last, [1] * 4, longer),
    ):
        batch = Batch(counts, seq_lens, block_size, head_dim)
        batch.table, batch.caches = whole.table, cache[0]
        batch.query, batch.key, batch.value = (
            part[rows] for part in (whole.query, wanted_key, wanted_value)
        )
        batch.slot_mapping = whole.slot_mapping[rows]
        metadata = replace(batch.metadata(), kv_cache=cache)
        outputs[rows] = attend(batch, metadata, **options)
    whole.key, whole.value = (rounded(part, dtype) for part in (wanted_key, wanted_value))
    expected, _ = whole.expected(**options)
    torch.testing.assert_close(outputs, expected, atol=2e-5, rtol=2e-5)
    whole.key, whole.value = wanted_key, wanted_value
    exact, _ = whole.expected(**options)
    error = float((outputs - exact).norm() / exact.norm())
    assert 1e-6 < error < {"float16": 1e-3, "bfloat16": 8e-3, "int8": 2e-2}[dtype]


def test_a_number_that_is_not_finite_shows_in_a_cache_of_int8() -> None:
    cache = torch.zeros(1, 2, 40, KV_HEADS, 16, 20, dtype=torch.int8)
    for part, number in (("key", torch.nan), ("value", torch.nan), ("value", torch.inf)):
        batch = Batch([3, 3], [3, 3], 16, 16)
        getattr(batch, part)[1, 0, 5] = number
        batch.caches = cache[0].clone()
        metadata = batch.metadata()
        output = attend(batch, metadata, **OPTIONS[0])
        group = HEADS // KV_HEADS
        assert not output[1:3, :group].isfinite().any()
        assert output[3:].isfinite().all() and output[:, group:].isfinite().all()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_text_does_not_depend_on_the_batch(family: str, dtype: str, tmp_path: Path) -> None:
    """Compiled bodies and those of transformers; chunked, preempted, with shared prefixes."""
    save_model(family, tmp_path)
    alone = Engine(tmp_path, kv_cache_dtype=dtype, enable_prefix_caching=False)
    crowd = Engine(tmp_path, kv_cache_dtype=dtype, num_blocks=14, max_num_batched_tokens=64)
    wanted = [(prompt, 6 + i % 12) for i, prompt in enumerate(prompts(16))]
    for _ in range(2):
        requests = [crowd.add(prompt, max_tokens) for prompt, max_tokens in wanted]
        crowd.run()
        for request, (prompt, max_tokens) in zip(requests, wanted, strict=True):
            assert crowd.tokens(request) == alone.complete(prompt, max_tokens)
    assert crowd.core.stats().preemptions > 0 and crowd.core.stats().prefix_hits > 0


def test_fewer_bits_hold_more_tokens_in_the_same_memory(llama: Path) -> None:
    blocks, sizes = {}, {}
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        config = make_config(
            llama, kv_cache_dtype=dtype, num_blocks=None, kv_cache_memory_bytes=1 << 20
        )
        worker = Worker(config)
        sizes[dtype] = worker.load().kv_bytes_per_token
        blocks[dtype] = worker.profile()
    assert blocks["float16"] == blocks["bfloat16"] == 2 * blocks["float32"]
    assert blocks["int8"] == blocks["float32"] * 32 // 12  # head_dim is 8: 8 bytes and a step of 4
    assert sizes["float32"] == 2 * sizes["float16"] == 32 * sizes["int8"] // 12


@pytest.mark.parametrize(
    ("dtype", "asked", "expected"),
    [
        ("auto", "auto", "float16"),
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("auto", "float32", "float32"),
        ("bfloat16", "int8", "int8"),
    ],
)
def test_the_type_of_the_cache(llama: Path, dtype: str, asked: str, expected: str) -> None:
    model = load(llama, dtype=dtype, kv_cache_dtype=asked)
    assert model.kv_cache_dtype == getattr(torch, expected)


def test_a_model_whose_keys_are_too_large_for_sixteen_bits_keeps_float32(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight *= 1e6
    model.save_pretrained(tmp_path)
    assert load(tmp_path, dtype="auto").kv_cache_dtype == torch.float32
    assert load(tmp_path, dtype="auto", kv_cache_dtype="float16").kv_cache_dtype == torch.float16


def test_a_model_that_amplifies_roundings_keeps_float32(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MAX_KV_ERROR", 1e-9)
    assert load(llama, dtype="auto").kv_cache_dtype == torch.float32


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_a_gpu_refuses_the_types_of_the_cpu(llama: Path, dtype: str) -> None:
    with pytest.raises(ConfigurationError, match=f"dtype {dtype} works only on the CPU"):
        Worker(make_config(llama, kv_cache_dtype=dtype), CudaOnCpuBackend()).load()
