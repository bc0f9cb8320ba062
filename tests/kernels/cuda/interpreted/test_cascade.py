"""Compare decode over shared prefixes with the reference, which reads each row's own table.

The tolerance is 1e-6 (float32) and 1e-3 (float16) of the result's norm.
"""

from typing import Any

import pytest
import torch
from paged import paged_inputs, relative_error, share_prefixes

from quire.kernels import reference
from quire.kernels.cuda.attention.cascade import CascadeWorkspace
from quire.kernels.cuda.attention.decode_schedule import DecodeWorkspace, build_decode_schedule
from quire.kernels.cuda.attention.paged_attention_decode import paged_attention_decode
from quire.kernels.cuda.tuning import TileConfig
from quire.kernels.prefix_groups import PrefixGroup, find_prefix_groups

NAN = float("nan")
TILE = TileConfig(16, 16, 4, 1)


def cascade_error(
    seq_lens: list[int],
    groups: list[PrefixGroup],
    heads: tuple[int, int, int],
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    query_len: int = 1,
    config: TileConfig = TILE,
    scales: torch.Tensor | None = None,
    **options: Any,
) -> float:
    inputs = paged_inputs(
        [query_len] * len(seq_lens), seq_lens, num_heads=heads[0], num_kv_heads=heads[1],
        head_dim=heads[2], block_size=block_size, dtype=dtype,
    )  # fmt: skip
    share_prefixes(inputs, groups, block_size)
    caches = (inputs.key_cache, inputs.value_cache)
    if scales is not None:
        caches = tuple(cache.to(torch.float8_e4m3fn) for cache in caches)  # type: ignore[assignment]
    workspace = DecodeWorkspace.allocate(
        len(seq_lens) + 2,
        *heads,
        dtype=dtype,
        device="cpu",
        query_len=query_len,
        min_chunk=32,
        programs_per_sm=1,
    )
    cascade = CascadeWorkspace.allocate(workspace, dtype=dtype, config=config)
    rest = (inputs.block_table, inputs.seq_lens)
    options |= {"scale": inputs.scale, "kv_scales": scales}
    expected = reference.paged_attention_decode(inputs.query.double(), *caches, *rest, **options)
    errors = []
    for served in (groups, groups[:1]):  # the tables of one step must not affect the next
        workspace.partials.fill_(NAN)
        cascade.partials.fill_(NAN)
        cascade.log_sums.fill_(NAN)
        cascade.set_groups(served)
        build_decode_schedule(inputs.seq_lens, workspace, prefix_lens=cascade.prefix_lens)
        out = torch.full_like(inputs.query, NAN)
        paged_attention_decode(
            inputs.query, *caches, *rest, **options, workspace=workspace, cascade=cascade, out=out
        )
        errors.append(relative_error(out, expected))
        assert not workspace.arrived.any()
    return max(errors)


GROUPS = [PrefixGroup((0, 2, 3, 5, 6), 48), PrefixGroup((7, 1), 16)]
LENS = [70, 17, 49, 120, 0, 64, 51, 33]


@pytest.mark.parametrize("heads", [(1, 1, 32), (14, 2, 32), (3, 1, 80), (16, 1, 16), (6, 2, 96)])
def test_heads(heads: tuple[int, int, int]) -> None:
    """A tile holds one member (16 heads per kv head), two with two idle rows (7), or sixteen
    (1)."""
    assert cascade_error(LENS, GROUPS, heads) < 1e-6


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks(dtype: torch.dtype, tolerance: float, sinks: bool) -> None:
    """Sinks count once, with the keys after the prefix."""
    options = {"softcap": 3.0, "sinks": torch.randn(6) if sinks else None}
    groups = [PrefixGroup((0, 2, 3), 64)]
    lens = [66, 10, 80, 65]
    config = TileConfig(32, 32, 4, 2)
    assert (
        cascade_error(lens, groups, (6, 2, 32), dtype=dtype, config=config, **options) < tolerance
    )


def test_several_query_tokens_and_large_blocks() -> None:
    groups = [PrefixGroup((3, 1, 0), 64)]
    lens = [67, 130, 5, 96]
    error = cascade_error(lens, groups, (4, 2, 32), block_size=64, query_len=3)
    assert error < 1e-6


def test_float8_cache() -> None:
    scales = torch.tensor([[0.5, 1.5], [2.0, 0.25]])
    assert cascade_error(LENS, GROUPS, (14, 2, 32), scales=scales) < 1e-6


def test_long_prefixes_are_split_within_the_scratch() -> None:
    """Every layout of groups fits: few and many, long and short."""
    workspace = DecodeWorkspace.allocate(64, 8, 2, 32, dtype=torch.float32, device="cpu")
    cascade = CascadeWorkspace.allocate(workspace, dtype=torch.float32, config=TILE)
    entries, max_items = len(cascade.partials), cascade.items.shape[1]
    for size in (1, 2, 3, 4, 5, 9, 16, 31, 64):
        for length in (16, 512, 4096, 1 << 20):
            rows = range(64 // size * size)
            groups = [
                PrefixGroup(tuple(rows[at : at + size]), length) for at in range(0, len(rows), size)
            ]
            cascade.set_groups(groups)
            lengths, first, splits = cascade.prefixes.tolist()
            spans = [(f, f + s) for f, s, n in zip(first, splits, lengths, strict=True) if n]
            assert len(spans) == len(rows) and spans[0][0] == 0
            assert all(before[1] == after[0] for before, after in zip(spans, spans[1:]))  # noqa: B905
            assert spans[-1][1] <= entries
            items = [item for item in cascade.items.T.tolist() if item[1]]
            assert 0 < len(items) <= max_items
            covered = sum(count * (end - begin) for _, count, begin, end, _ in items)
            assert covered == len(rows) * length


def test_found_groups_give_the_reference_results() -> None:
    """Groups that `find_prefix_groups` finds in block tables give the reference's results."""
    heads = (8, 2, 32)
    inputs = paged_inputs(
        [1] * 6, [600, 530, 20, 700, 640, 577], num_heads=8, num_kv_heads=2, head_dim=32,
        block_size=32,
    )  # fmt: skip
    share_prefixes(inputs, [PrefixGroup((0, 1, 3, 4, 5), 512)], 32)
    workspace = DecodeWorkspace.allocate(6, *heads, dtype=torch.float32, device="cpu")
    cascade = CascadeWorkspace.allocate(workspace, dtype=torch.float32)
    tables, lens = inputs.block_table.tolist(), inputs.seq_lens.tolist()
    options = {"tile": cascade.tile, "min_tokens": 128}
    assert find_prefix_groups(tables, lens, 32, cascade.cost, **options) == [], "a small saving"
    groups = find_prefix_groups(tables, lens, 32, cascade.cost, **options, launch_bytes=0)
    assert groups == [PrefixGroup((0, 1, 3, 4, 5), 512)]
    cascade.set_groups(groups)
    build_decode_schedule(inputs.seq_lens, workspace, prefix_lens=cascade.prefix_lens)
    rest = (inputs.block_table, inputs.seq_lens)
    caches = (inputs.key_cache, inputs.value_cache)
    found = paged_attention_decode(
        inputs.query, *caches, *rest, scale=0.2, workspace=workspace, cascade=cascade
    )
    expected = reference.paged_attention_decode(inputs.query.double(), *caches, *rest, scale=0.2)
    assert relative_error(found, expected) < 1e-6


def test_refusals() -> None:
    def workspace(**change: Any) -> DecodeWorkspace:
        shape = {"max_num_seqs": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32} | change
        return DecodeWorkspace.allocate(**shape, dtype=torch.float32, device="cpu")

    with pytest.raises(ValueError, match="window"):
        CascadeWorkspace.allocate(workspace(window=64), dtype=torch.float32)
    with pytest.raises(ValueError, match="tile"):
        CascadeWorkspace.allocate(workspace(num_heads=64), dtype=torch.float32, config=TILE)
    cascade = CascadeWorkspace.allocate(workspace(), dtype=torch.float32, config=TILE)
    for groups in (
        [PrefixGroup((0, 1), 40)],
        [PrefixGroup((0, 1), 0)],
        [PrefixGroup((0, 4), 32)],
        [PrefixGroup((0, 1), 32), PrefixGroup((1, 2), 32)],
    ):
        with pytest.raises(ValueError):
            cascade.set_groups(groups)
    inputs = paged_inputs([1, 1], [9, 20], num_heads=8, num_kv_heads=2, head_dim=32, block_size=16)
    with pytest.raises(ValueError, match="cascade"):
        paged_attention_decode(
            inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_table,
            inputs.seq_lens, scale=1.0, workspace=workspace(num_heads=8), cascade=cascade,
        )  # fmt: skip
