"""Compare each device's attention with the plain reference of the kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from quire.engine.attention import interface as attention
from quire.engine.attention.metadata import AttentionMetadata, AttentionPlan
from quire.engine.devices.cpu.attention import CpuPlan, CpuPlanner
from quire.engine.devices.cuda.attention import CudaPlan
from quire.engine.layers.attention_shape import AttentionShape
from quire.kernels import reference

from ..devices.cuda_on_cpu import REFERENCES

HEADS, KV_HEADS = 6, 2


class Batch:
    """Random sequences over shuffled blocks, whose tokens before this step are already cached."""

    def __init__(
        self, query_lens: list[int], seq_lens: list[int], block_size: int, head_dim: int
    ) -> None:
        generator = torch.Generator().manual_seed(sum(seq_lens))

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        blocks = [-(-length // block_size) for length in seq_lens]
        order = torch.randperm(sum(blocks) + 2, generator=generator, dtype=torch.int32)
        table = torch.zeros(len(seq_lens), max(blocks), dtype=torch.int32)
        slots = []
        for row, (count, new, length) in enumerate(zip(blocks, query_lens, seq_lens, strict=True)):
            table[row, :count], order = order[:count], order[count:]
            positions = torch.arange(length - new, length)
            slots.append(table[row, positions // block_size] * block_size + positions % block_size)
        tokens = sum(query_lens)
        self.query, self.sinks = randn(tokens, HEADS, head_dim), randn(HEADS)
        # As transformers hands them over: views of [heads, tokens, head_dim].
        self.key, self.value = randn(2, KV_HEADS, tokens, head_dim).transpose(1, 2)
        self.caches = randn(2, sum(blocks) + 2, KV_HEADS, block_size, head_dim)
        self.slot_mapping = torch.cat(slots).long()
        self.table = table
        self.query_start_loc = torch.tensor([0, *query_lens]).cumsum(0).int()
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        self.num_decodes = query_lens.count(1)
        self.max_query_len = max(query_lens)
        self.block_size = block_size

    def metadata(self, plan: AttentionPlan | None = None) -> AttentionMetadata:
        kv_cache = self.caches[None].clone()
        return AttentionMetadata(
            kv_cache=kv_cache,
            slot_mapping=self.slot_mapping,
            block_table=self.table,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            num_decodes=self.num_decodes,
            max_query_len=self.max_query_len,
            plan=plan or self.cpu_plan(shares=True),
        )

    def cpu_plan(self, *, shares: bool) -> CpuPlan:
        return CpuPlanner(HEADS, self.caches[None], shares=shares).cut(
            self.query_start_loc.numpy(),
            self.seq_lens.numpy(),
            self.table[: self.num_decodes].numpy(),
        )

    def expected(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attended values, and the caches after the write."""
        key_cache, value_cache = self.caches.clone()
        reference.reshape_and_cache(self.key, self.value, key_cache, value_cache, self.slot_mapping)
        output = reference.paged_attention_extend(
            self.query,
            key_cache,
            value_cache,
            self.table,
            self.query_start_loc,
            self.seq_lens,
            max_query_len=self.max_query_len,
            **options,
        )
        return output, torch.stack((key_cache, value_cache))


BATCHES = {
    "decodes": ([1] * 6, [1, 16, 17, 33, 130, 300]),
    "prefills": ([2, 16, 40, 300], [2, 16, 40, 300]),
    "chunks": ([5, 16, 33], [21, 64, 310]),
    "mixed": ([1, 1, 1, 7, 270, 3], [40, 5, 1, 7, 290, 130]),
}


def attend(batch: Batch, metadata: AttentionMetadata, **options: Any) -> torch.Tensor:
    """Attend through the metadata's plan, as a layer does."""
    return metadata.plan.attend(
        batch.query,
        batch.key,
        batch.value,
        metadata.kv_cache[0],
        metadata,
        kv_scales=None,
        **options,
    )


def transpose_keys(caches: torch.Tensor) -> None:
    """Store keys in place as the CPU does: `[2, blocks, kv_heads, block_size, head_dim]`."""
    shape = caches.shape[1:]
    caches[0] = caches[0].transpose(-1, -2).clone().reshape(shape)


def transpose_back(caches: torch.Tensor) -> torch.Tensor:
    *rest, block_size, head_dim = caches.shape[1:]
    keys = caches[0].reshape(*rest, head_dim, block_size).transpose(-1, -2)
    return torch.stack((keys, caches[1]))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 24, 1000, -24])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (64, 16), (128, 128)])
@pytest.mark.parametrize("batch_name", sorted(BATCHES))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_devices_agree_with_the_reference(
    device: str,
    batch_name: str,
    block_size: int,
    head_dim: int,
    window: int | None,
    with_sinks: bool,
    softcap: float | None,
) -> None:
    batch = Batch(*BATCHES[batch_name], block_size, head_dim)
    options = {
        "scale": 0.3,
        "window": window,
        "softcap": softcap,
        "sinks": batch.sinks if with_sinks else None,
    }
    # With the kernels' references, CUDA's plan shows that the calls are right.
    shape = AttentionShape(HEADS, KV_HEADS, head_dim, window)
    cuda_plan = CudaPlan(REFERENCES, {shape: None}, None)  # type: ignore[dict-item]
    metadata = batch.metadata(cuda_plan if device == "cuda" else None)
    caches = metadata.kv_cache[0]
    if device == "cpu":
        transpose_keys(caches)
    output = attend(batch, metadata, **options)
    expected, expected_caches = batch.expected(**options)
    if device == "cpu":
        caches = transpose_back(caches)
    assert torch.equal(caches, expected_caches)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_tiles_cover_every_query_once_and_the_longest_come_first() -> None:
    query_lens, seq_lens = [1, 1, 7, 270, 16, 3], [40, 5, 7, 290, 16, 130]
    loc = np.cumsum([0, *query_lens]).astype(np.int32)
    planner = CpuPlanner(3, torch.empty(1, 2, 1, 1, 16, 64))
    plan = planner.cut(loc, np.array(seq_lens, dtype=np.int32))
    assert plan.tile_queries == 16
    assert (plan.tiles[:, 1] - plan.tiles[:, 0] == 1).all() and not plan.tiles[:, 2].any()
    members = plan.members[plan.tiles[:, 0]]
    queries = [
        loc[sequence] + query
        for sequence, first in members
        for query in range(first, min(first + plan.tile_queries, query_lens[sequence]))
    ]
    assert sorted(queries) == list(range(loc[-1]))
    work = [
        min(query_lens[sequence] - first, 16) * seq_lens[sequence] for sequence, first in members
    ]
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 24, -24])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (64, 16), (128, 128)])
@pytest.mark.parametrize("prefill", [(), (40,)])
def test_reading_a_shared_prefix_once_changes_no_bit(
    block_size: int,
    head_dim: int,
    prefill: tuple[int, ...],
    window: int | None,
    with_sinks: bool,
    softcap: float | None,
) -> None:
    seq_lens = [300, 400, 40, 257, 300, 290, 700]
    batch = Batch([*(1 for _ in seq_lens), *prefill], [*seq_lens, *prefill], block_size, head_dim)
    batch.table[[1, 4], : 256 // block_size] = batch.table[0, : 256 // block_size]
    batch.table[[3, 6], : 256 // block_size] = batch.table[5, : 256 // block_size]
    metadata = batch.metadata()
    transpose_keys(metadata.kv_cache[0])
    alone = replace(metadata, plan=batch.cpu_plan(shares=False))
    options = {
        "scale": 0.3,
        "window": window,
        "softcap": softcap,
        "sinks": batch.sinks if with_sinks else None,
    }
    outputs = [attend(batch, each, **options) for each in (metadata, alone)]
    plan = metadata.plan
    assert isinstance(plan, CpuPlan) and sorted(plan.tiles[plan.tiles[:, 2] > 0, 2]) == [256, 256]
    assert torch.equal(*outputs)
    expected, _ = batch.expected(**options)
    torch.testing.assert_close(outputs[0], expected, atol=1e-5, rtol=1e-5)


def test_a_padding_row_writes_nothing_and_attends_to_nothing() -> None:
    batch = Batch([1, 1], [40, 5], 16, 16)
    batch.seq_lens[1], batch.slot_mapping[1] = 0, -1
    metadata = batch.metadata()
    before = metadata.kv_cache[0].clone()
    options: dict[str, Any] = {"scale": 0.3, "window": None, "softcap": None, "sinks": None}
    output = attend(batch, metadata, **options)
    assert not output[1].any() and output[0].isfinite().all()
    assert (metadata.kv_cache[0] != before).sum() == 2 * KV_HEADS * 16


@pytest.mark.parametrize("head_dim", [16, 64])
def test_slots_past_the_end_are_not_read_and_a_nan_within_propagates(head_dim: int) -> None:
    batch = Batch([1, 1, 3], [40, 5, 20], 16, head_dim)
    options: dict[str, Any] = {"scale": 0.3, "window": None, "softcap": None, "sinks": None}
    expected, _ = batch.expected(**options)
    beyond = [(0, 40), (1, 5), (2, 20)]
    for row, position in beyond:
        batch.caches[:, batch.table[row, position // 16], :, position % 16 :] = torch.nan
    within = batch.table[0, 0]
    metadata = batch.metadata()
    transpose_keys(metadata.kv_cache[0])
    output = attend(batch, metadata, **options)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    transposed = metadata.kv_cache[0, 0, within].view(KV_HEADS, head_dim, 16)
    transposed[:, :, 3] = torch.nan
    output = attend(batch, metadata, **options)
    assert output[0].isnan().all() and output[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 24, -24])
@pytest.mark.parametrize("batch_name", sorted(BATCHES))
def test_sixteen_bit_types_agree_within_their_rounding(
    batch_name: str, window: int | None, dtype: torch.dtype
) -> None:
    batch = Batch(*BATCHES[batch_name], 16, 64)
    options: dict[str, Any] = {"scale": 0.3, "window": window, "softcap": None, "sinks": None}
    batch.query, batch.key, batch.value, batch.caches = (
        tensor.to(dtype).float() for tensor in (batch.query, batch.key, batch.value, batch.caches)
    )
    expected, _ = batch.expected(**options)
    batch.query, batch.key, batch.value, batch.caches = (
        tensor.to(dtype) for tensor in (batch.query, batch.key, batch.value, batch.caches)
    )
    metadata = batch.metadata()
    transpose_keys(metadata.kv_cache[0])
    output = attend(batch, metadata, **options)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=1e-2, rtol=1e-2)


def test_transformers_builds_no_attention_mask() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    attention.register_attention()
    assert attention.IMPLEMENTATION not in ALL_MASK_ATTENTION_FUNCTIONS
