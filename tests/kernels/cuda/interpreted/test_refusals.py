"""Test that launchers refuse arguments that do not fit, by name and before any launch."""

from typing import Any

import pytest
import torch
from paged import PagedInputs, paged_inputs

from quire.kernels.cuda.attention.decode_schedule import DecodeWorkspace, build_decode_schedule
from quire.kernels.cuda.attention.paged_attention_decode import paged_attention_decode
from quire.kernels.cuda.attention.paged_attention_extend import paged_attention_extend
from quire.kernels.cuda.copy_blocks import copy_blocks
from quire.kernels.cuda.reshape_and_cache import reshape_and_cache
from quire.kernels.cuda.rms_norm import fused_add_rms_norm, rms_norm
from quire.kernels.cuda.rope_and_cache import rope_and_cache
from quire.kernels.cuda.silu_and_mul import silu_and_mul

META = torch.device("meta")


@pytest.fixture
def inputs() -> PagedInputs:
    return paged_inputs([3, 3], [9, 20], num_heads=4, num_kv_heads=2, head_dim=32, block_size=16)


def arguments(inputs: PagedInputs) -> dict[str, Any]:
    names = ("query", "key_cache", "value_cache", "block_table", "query_start_loc", "seq_lens")
    options = {"scale": inputs.scale, "max_query_len": 3}
    return {name: getattr(inputs, name) for name in names} | options


@pytest.mark.parametrize(
    "name,change",
    [
        ("query", lambda x: x[:, :3]),
        ("query", lambda x: x.half()),
        ("query", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        ("query", lambda x: x.to(META)),
        ("key_cache", lambda x: x[:, :, :8].contiguous()),
        ("key_cache", lambda x: x.transpose(1, 2)),
        ("value_cache", lambda x: x[:-1]),
        ("value_cache", lambda x: x.half()),
        ("block_table", lambda x: x.long()),
        ("block_table", lambda x: x[:1]),
        ("query_start_loc", lambda x: x[:-1]),
        ("query_start_loc", lambda x: x.long()),
        ("seq_lens", lambda x: x.long()),
        ("seq_lens", lambda x: x[:1]),
        ("scale", lambda x: 0.0),
        ("max_query_len", lambda x: 0),
    ],
)
def test_extend_refuses(inputs: PagedInputs, name: str, change: Any) -> None:
    have = arguments(inputs)
    with pytest.raises(ValueError):
        paged_attention_extend(**have | {name: change(have[name])})


@pytest.mark.parametrize(
    "extra",
    [
        {"window": 0},
        {"softcap": -1.0},
        {"sinks": torch.zeros(3)},
        {"sinks": torch.zeros(4, dtype=torch.int32)},
        {"out": torch.zeros(6, 4, 32, dtype=torch.float16)},
        {"out": torch.zeros(5, 4, 32)},
    ],
)
def test_both_attentions_refuse_options(inputs: PagedInputs, extra: dict[str, Any]) -> None:
    have = arguments(inputs)
    with pytest.raises(ValueError):
        paged_attention_extend(**have | extra)
    del have["query_start_loc"], have["max_query_len"]
    workspace = DecodeWorkspace.allocate(
        2, 4, 2, 32, dtype=torch.float32, device="cpu", query_len=3, window=None
    )
    with pytest.raises(ValueError):
        paged_attention_decode(**have | extra, workspace=workspace)


@pytest.mark.parametrize(
    "change",
    [{"query_len": 1}, {"window": 8}, {"max_num_seqs": 1}, {"num_heads": 8}, {"head_dim": 64}],
)
def test_decode_refuses_a_workspace_of_another_shape(
    inputs: PagedInputs, change: dict[str, Any]
) -> None:
    shape = {"max_num_seqs": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "query_len": 3}
    have = arguments(inputs)
    del have["query_start_loc"], have["max_query_len"]
    workspace = DecodeWorkspace.allocate(**shape | change, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="workspace|query rows"):
        paged_attention_decode(**have, workspace=workspace)


@pytest.mark.parametrize(
    "change", [{"max_num_seqs": 0}, {"query_len": 9}, {"window": 0}, {"num_kv_heads": 3}]
)
def test_workspaces_are_refused(change: dict[str, Any]) -> None:
    shape = {"max_num_seqs": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    with pytest.raises(ValueError):
        DecodeWorkspace.allocate(**shape | change, dtype=torch.float32, device="cpu")


def test_schedules_are_refused() -> None:
    workspace = DecodeWorkspace.allocate(2, 4, 2, 32, dtype=torch.float32, device="cpu")
    for lengths in (torch.ones(3, dtype=torch.int32), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError):
            build_decode_schedule(lengths, workspace)
    lengths = torch.ones(2, dtype=torch.int32)
    for prefix_lens in (torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="prefix_lens"):
            build_decode_schedule(lengths, workspace, prefix_lens)


def test_cache_writes_refuse() -> None:
    caches = torch.zeros(2, 4, 2, 16, 32)
    key, slots = torch.zeros(3, 2, 32), torch.zeros(3, dtype=torch.int64)
    good: tuple[Any, ...] = (key, key, caches[0], caches[1], slots)
    bad = {0: key[:, :1], 1: key.int(), 2: caches[0, :, :, :, :12], 3: caches[1].half()}
    for position, tensor in (bad | {4: slots.int()}).items():
        wrong = [tensor if index == position else x for index, x in enumerate(good)]
        with pytest.raises(ValueError):
            reshape_and_cache(*wrong)
    cos = torch.zeros(3, 32)
    for wrong_cos in (torch.zeros(3, 33), torch.zeros(2, 32), torch.zeros(3, 64)):
        with pytest.raises(ValueError):
            rope_and_cache(torch.zeros(3, 4, 32), *good, wrong_cos, cos)
    with pytest.raises(ValueError):
        rope_and_cache(torch.zeros(3, 4, 32), *good, cos, cos, key_weight=torch.zeros(16))
    with pytest.raises(ValueError, match="rotated dimensions"):
        rope_and_cache(torch.zeros(3, 4, 32), *good, cos[:, :8], cos[:, :8], rotary_dim=32)


def test_copies_and_rows_refuse() -> None:
    kv_cache, ids = torch.zeros(2, 2, 4, 2, 16, 32), torch.zeros(2, dtype=torch.int64)
    for wrong in ((kv_cache[0], ids, ids), (kv_cache, ids.int(), ids), (kv_cache, ids, ids[:1])):
        with pytest.raises(ValueError):
            copy_blocks(*wrong)
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(ValueError):
        rms_norm(x, weight[:4], eps=1e-6)
    with pytest.raises(ValueError):
        rms_norm(x, weight, eps=-1.0)
    with pytest.raises(ValueError):
        fused_add_rms_norm(x, x.half(), weight, eps=1e-6)
    with pytest.raises(ValueError):
        silu_and_mul(x[:, :7])
