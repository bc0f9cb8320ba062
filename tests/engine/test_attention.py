"""Both backends of the attention function against the kernels' plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire.engine import attention, attention_cpu
from quire.engine.attention import AttentionMetadata, attend_on_cpu, attend_on_cuda
from quire.engine.attention_cpu import Scratch, build_cpu_plan
from quire.kernels import reference

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16


class Batch:
    """Random sequences over shuffled blocks; what this step does not write is already cached."""

    def __init__(self, query_lens: list[int], seq_lens: list[int], block_size: int) -> None:
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
        self.query, self.sinks = randn(tokens, HEADS, HEAD_DIM), randn(HEADS)
        # As transformers hands them over: views of [heads, tokens, head_dim].
        self.key, self.value = randn(2, KV_HEADS, tokens, HEAD_DIM).transpose(1, 2)
        self.caches = randn(2, sum(blocks) + 2, KV_HEADS, block_size, HEAD_DIM)
        self.slot_mapping = torch.cat(slots).long()
        self.table = table
        self.query_start_loc = torch.tensor([0, *query_lens]).cumsum(0).int()
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        self.num_decodes = query_lens.count(1)
        self.max_query_len = max(query_lens)
        self.block_size = block_size

    def metadata(self, window: int | None) -> AttentionMetadata:
        kv_cache = self.caches[None].clone()
        plan = build_cpu_plan(
            kv_cache=kv_cache,
            slot_mapping=self.slot_mapping.numpy(),
            block_table=self.table.numpy(),
            query_start_loc=self.query_start_loc.numpy(),
            seq_lens=self.seq_lens.numpy(),
            num_decodes=self.num_decodes,
            windows=frozenset({window}),
            scratch=Scratch(),
        )
        return AttentionMetadata(
            kv_cache=kv_cache,
            slot_mapping=self.slot_mapping,
            block_table=self.table,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            num_decodes=self.num_decodes,
            max_query_len=self.max_query_len,
            workspaces={window: None},  # type: ignore[dict-item]
            cpu_plan=plan,
        )

    def expected(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The attended values, and the caches after the write."""
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


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand the plain references in for the Triton kernels, so that the calls are checked."""
    from quire.kernels import paged_attention_decode, paged_attention_extend, reshape_and_cache

    for module in (paged_attention_decode, paged_attention_extend, reshape_and_cache):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, name, getattr(reference, name))


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 24, 1000])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("batch_name", sorted(BATCHES))
@pytest.mark.parametrize("attend", [attend_on_cpu, attend_on_cuda])
def test_backends_agree_with_the_reference(
    attend: Any,
    batch_name: str,
    block_size: int,
    window: int | None,
    with_sinks: bool,
    softcap: float | None,
) -> None:
    batch = Batch(*BATCHES[batch_name], block_size)
    options = {
        "scale": 0.3,
        "window": window,
        "softcap": softcap,
        "sinks": batch.sinks if with_sinks else None,
    }
    metadata = batch.metadata(window)
    caches = metadata.kv_cache[0]
    output = attend(batch.query, batch.key, batch.value, caches, metadata, **options)
    expected, expected_caches = batch.expected(**options)
    assert torch.equal(caches, expected_caches)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("limit", [1, 64, 1000])
def test_groups_of_decodes_bound_their_padding(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Every row is in one group, no group is wider than twice its shortest, and none but a
    single row's is over the limit."""
    token_bytes = KV_HEADS * HEAD_DIM * 4
    monkeypatch.setattr(attention_cpu, "GROUP_BYTES", limit * token_bytes)
    lengths = [1, 1000, 16, 17, 500, 90, 100, 3, 700, 31]
    batch = Batch([1] * len(lengths), lengths, 16)
    plan = batch.metadata(None).cpu_plan
    assert plan is not None
    groups = plan.windows[None].decodes
    members = [torch.arange(10)[group.rows].tolist() for group in groups]
    assert sorted(row for rows in members for row in rows) == list(range(10))
    for group, rows in zip(groups, members, strict=True):
        blocks = [-(-lengths[row] // 16) for row in rows]
        assert group.num_keys == max(blocks) * 16 and max(blocks) <= 2 * min(blocks)
        assert len(blocks) == 1 or len(blocks) * group.num_keys <= max(limit, 16)
    options: dict[str, Any] = {"scale": 0.3, "window": None, "softcap": None, "sinks": None}
    metadata = batch.metadata(None)
    output = attend_on_cpu(
        batch.query, batch.key, batch.value, metadata.kv_cache[0], metadata, **options
    )
    torch.testing.assert_close(output, batch.expected(**options)[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("batch_name", sorted(BATCHES))
def test_sixteen_bits_give_the_same_within_their_rounding(
    batch_name: str, window: int | None
) -> None:
    batch = Batch(*BATCHES[batch_name], 16)
    options: dict[str, Any] = {"scale": 0.3, "window": window, "softcap": None, "sinks": None}
    batch.query, batch.key, batch.value, batch.caches = (
        tensor.bfloat16().float() for tensor in (batch.query, batch.key, batch.value, batch.caches)
    )
    expected, _ = batch.expected(**options)
    batch.query, batch.key, batch.value, batch.caches = (
        tensor.bfloat16() for tensor in (batch.query, batch.key, batch.value, batch.caches)
    )
    metadata = batch.metadata(window)
    output = attend_on_cpu(
        batch.query, batch.key, batch.value, metadata.kv_cache[0], metadata, **options
    )
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=4e-2, rtol=2e-2)


@pytest.mark.parametrize("window", [None, 5])
def test_causal_masks_of_any_size_are_parts_of_one(window: int | None) -> None:
    scratch = Scratch()
    for queries, keys in [(3, 3), (64, 700), (256, 256), (1, 300), (256, 2000), (2, 9)]:
        mask = scratch.causal_mask(queries, keys, window, torch.float32)
        position = torch.arange(keys - queries, keys)[:, None]
        key = torch.arange(keys)
        sees = key <= position
        if window is not None:
            sees &= key > position - window
        assert torch.equal(mask == 0, sees) and torch.equal(mask == -torch.inf, ~sees)


def test_transformers_builds_no_mask_for_it() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    attention.register_attention()
    assert attention.IMPLEMENTATION not in ALL_MASK_ATTENTION_FUNCTIONS
