"""Test the sizing of the KV cache."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine.devices.backend import Backend
from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.errors import ConfigurationError
from quire.engine.layers.layer_groups import LayerGroup, LayerGroups
from quire.engine.model.model_spec import ModelSpec
from quire.engine.runner.kv_cache import (
    allocate_kv_cache,
    block_bytes,
    check_tables,
    num_blocks_from_memory,
)

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..worker_driver import make_config

SPEC = ModelSpec(
    architecture="Test",
    num_layers=3,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=128,
    max_position=1024,
    windows=(None,) * 3,
    eos_token_ids=(2,),
    dtype="float32",
)
ONE = LayerGroups.one_table(3)
TWO = LayerGroups((LayerGroup(None, (0,)), LayerGroup(20, (1, 2))))
BLOCK = 16 * 2 * 3 * 2 * 8 * 4  # slots, K and V, layers, heads, head_dim, bytes


def config(**values: Any) -> Any:
    return make_config(Path("none"), **{"num_blocks": None} | values)


@pytest.mark.parametrize("backend", [CpuBackend(), CudaOnCpuBackend()])
def test_the_tensor_has_the_computed_size(backend: Backend) -> None:
    cache = allocate_kv_cache(backend, SPEC, ONE, 5, 16, torch.float32)
    assert cache.shape == (3, 2, 5, 2, 16, 8)
    assert cache.nbytes == 5 * block_bytes(SPEC, ONE, 16, torch.float32) == 5 * BLOCK
    assert not cache.any()


def test_a_windowed_cache_has_a_place_for_each_layer_of_a_group_and_a_null_block() -> None:
    cache = allocate_kv_cache(CpuBackend(), SPEC, TWO, 5, 16, torch.float32)
    assert cache.shape == (2, 2, 5 + 1, 2, 16, 8)
    assert cache.nbytes == 6 * block_bytes(SPEC, TWO, 16, torch.float32) == 6 * BLOCK * 2 // 3


def test_float8_takes_a_quarter_of_float32() -> None:
    def blocks(dtype: torch.dtype) -> int:
        return num_blocks_from_memory(
            10 * BLOCK, config(), ONE, block_bytes(SPEC, ONE, 16, dtype), 128, 16
        )

    assert blocks(torch.float8_e4m3fn) == 2 * blocks(torch.bfloat16) == 4 * blocks(torch.float32)
    cache = allocate_kv_cache(CudaOnCpuBackend(), SPEC, ONE, 5, 16, torch.float8_e4m3fn)
    assert cache.nbytes == 5 * BLOCK // 4 and not cache.float().any()


def test_blocks_fill_the_memory() -> None:
    def blocks(memory: int, **values: Any) -> int:
        return num_blocks_from_memory(memory, config(**values), ONE, BLOCK, 128, 16)

    assert blocks(10 * BLOCK) == 10
    assert blocks(11 * BLOCK - 1) == 10
    assert blocks(8 * BLOCK) == 8
    assert blocks(0, num_blocks=9) == 9


@pytest.mark.parametrize("memory", [7 * BLOCK, 0, -5])
def test_a_cache_too_small_for_one_sequence_is_refused_in_one_line(memory: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        num_blocks_from_memory(memory, config(), ONE, BLOCK, 128, 16)
    message = caught.value.message
    assert "\n" not in message
    assert ("--max-model-len 112 " in message) == (memory > 0)


def test_the_last_token_needs_no_slot() -> None:
    assert num_blocks_from_memory(8 * BLOCK, config(), ONE, BLOCK, 129, 16) == 8
    with pytest.raises(ConfigurationError):
        num_blocks_from_memory(8 * BLOCK, config(), ONE, BLOCK, 130, 16)


def test_one_sequence_needs_its_tokens_in_full_groups_and_windows_and_a_step_in_others() -> None:
    needed = 64 + (2 + 3 + 1)  # 1,024 tokens; a window of 20 and a step of 40
    fields: Any = (config(max_num_batched_tokens=40), TWO, 100, 1025, 40)
    assert num_blocks_from_memory(100 * (needed + 1), *fields) == needed
    with pytest.raises(ConfigurationError, match="lower --max-num-batched.*max-model-len 1008 "):
        num_blocks_from_memory(100 * needed, *fields)


def test_a_cache_that_no_device_holds_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not fit"):
        allocate_kv_cache(CpuBackend(), SPEC, ONE, 2**45, 16, torch.float32)


def test_absurd_sizes_are_refused_before_anything_is_allocated() -> None:
    for name in ("num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
        with pytest.raises(ConfigurationError, match=f"{name} must be .*at most"):
            config(**{name: 2**40})
    with pytest.raises(ConfigurationError, match="--max-num-seqs 65536 sequences of 1048576"):
        check_tables(config(max_num_seqs=65536), ONE, 2**20)
    check_tables(config(max_num_seqs=256), ONE, 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigurationError, match="1000000000 blocks .* does not fit the memory"):
        allocate_kv_cache(CpuBackend(), SPEC, ONE, 10**9, 16, torch.float32, commit=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB
