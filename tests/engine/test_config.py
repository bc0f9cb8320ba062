"""Test the flags that EngineConfig declares, and the EngineInfo made from a worker's report."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from quire.engine.config import EngineConfig, EngineInfo, WorkerInfo, engine_flags
from quire.engine.errors import ConfigurationError


def test_every_field_but_a_few_is_a_flag() -> None:
    """But for the adapters, which the server's flags --lora name in another form."""
    flags = engine_flags()
    others = {"model", "lora", "skip_broken_lora", "num_peers", "lowers_max_num_seqs"}
    assert others | {flag.field for flag in flags} == {f.name for f in fields(EngineConfig)}
    names = {flag.field: flag.name for flag in flags if flag.field != flag.name}
    assert names == {
        "num_blocks": "num_gpu_blocks_override",
        "kv_cache_memory_bytes": "kv_cache_memory",
    }
    assert all(flag.help.endswith(".") for flag in flags)
    config = EngineConfig(model="m")
    assert all(getattr(config, flag.field) == flag.default for flag in flags)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be at least 1"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization must be above 0 and at most 1"),
        ({"gpu_memory_utilization": float("nan")}, "must be above 0 and at most 1"),
        ({"scheduling_policy": "lifo"}, "unknown scheduling policy 'lifo': choose from fcfs, "),
        ({"quantization": "int3"}, "unknown quantization 'int3': choose from int8, int4"),
        ({"block_size": 48}, "--block-size must be a power of two from 16 to 128, not 48"),
    ],
)
def test_refusals_name_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EngineConfig(model="m", **values)


def test_engine_info_keeps_all_that_the_worker_reports() -> None:
    values: dict[str, Any] = {f.name: f"{f.name} of the worker" for f in fields(WorkerInfo)}
    values |= {"vocab_size": 10, "max_num_batched_tokens": 64, "is_asynchronous": True}
    values["group_windows"] = (None,)
    config = EngineConfig(model="m", block_size=32, max_num_seqs=3, max_logprobs=4)
    info = EngineInfo.of(config, WorkerInfo(**values), 5)
    assert {name: getattr(info, name) for name in values} == values
    assert (info.model, info.max_num_seqs, info.max_logprobs) == ("m", 3, 4)
    assert info.step_tokens == 128 and info.kv_capacity_tokens == 5 * 32
