"""Compare both attention kernels with the reference in float64.

The tolerance is 1e-6 (float32) and 1e-3 (float16) of the result's Frobenius norm. The interpreter
has no bfloat16 matmul; that one is checked on GPUs.
"""

import functools
from typing import Any

import pytest
import torch
from paged import PagedInputs, paged_inputs, relative_error

from quire.kernels import reference
from quire.kernels.cuda.attention.decode_schedule import DecodeWorkspace, build_decode_schedule
from quire.kernels.cuda.attention.paged_attention_decode import paged_attention_decode
from quire.kernels.cuda.attention.paged_attention_extend import paged_attention_extend
from quire.kernels.cuda.tuning import TileConfig

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3}
NAN = float("nan")
EVERYTHING: dict[str, Any] = {"window": 20, "softcap": 5.0}
HEADS = [(2, 2, 32), (4, 2, 64), (14, 2, 32), (3, 1, 80), (16, 1, 16), (6, 2, 96), (2, 1, 256)]


def tensors(inputs: PagedInputs, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(dtype) for x in (inputs.query, inputs.key_cache, inputs.value_cache))


def extend_error(
    query_lens: list[int],
    seq_lens: list[int],
    heads: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype = torch.float32,
    config: TileConfig | None = None,
    **options: Any,
) -> float:
    inputs = paged_inputs(
        query_lens, seq_lens, num_heads=heads[0], num_kv_heads=heads[1], head_dim=heads[2],
        block_size=block_size, dtype=dtype,
    )  # fmt: skip
    rest = (inputs.block_table, inputs.query_start_loc, inputs.seq_lens)
    options |= {"scale": inputs.scale, "max_query_len": max(query_lens)}
    expected = reference.paged_attention_extend(*tensors(inputs, torch.float64), *rest, **options)
    out = torch.full_like(inputs.query, NAN)
    found = paged_attention_extend(
        *tensors(inputs, dtype), *rest, **options, out=out, config=config
    )
    assert found is out
    return relative_error(out, expected)


def decode_error(
    seq_lens: list[int],
    heads: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype = torch.float32,
    query_len: int = 1,
    min_chunk: int = 32,
    **options: Any,
) -> float:
    inputs = paged_inputs(
        [query_len] * len(seq_lens), seq_lens, num_heads=heads[0], num_kv_heads=heads[1],
        head_dim=heads[2], block_size=block_size, dtype=dtype,
    )  # fmt: skip
    workspace = DecodeWorkspace.allocate(
        len(seq_lens) + 2, *heads, dtype=dtype, device="cpu", window=options.get("window"),
        query_len=query_len, min_chunk=min_chunk,
    )  # fmt: skip
    workspace.partials.fill_(NAN)
    rest = (inputs.block_table, inputs.seq_lens)
    options |= {"scale": inputs.scale}
    expected = reference.paged_attention_decode(*tensors(inputs, torch.float64), *rest, **options)
    launch = functools.partial(
        paged_attention_decode, *tensors(inputs, dtype), *rest, **options, workspace=workspace
    )
    errors = []
    for _ in range(2):  # the second launch needs the counters that the first one reset
        build_decode_schedule(inputs.seq_lens, workspace)
        out = torch.full_like(inputs.query, NAN)
        launch(out=out)
        errors.append(relative_error(out, expected))
        assert not workspace.arrived.any()
    return max(errors)


@pytest.mark.parametrize("options", [{}, EVERYTHING])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "decodes,prompts,padding",
    [([40, 1, 90], [(19, 30), (5, 5)], 13), ([], [(33, 70)], 0), ([7, 40], [], 1), ([], [], 9)],
)
def test_a_mixed_step_whose_decodes_only_the_device_knows(
    decodes: list[int],
    prompts: list[tuple[int, int]],
    padding: int,
    options: dict[str, Any],
    sinks: bool,
) -> None:
    """Both kernels get all rows of a padded step, with launches that depend on nothing but its
    size. The row of the padding has zeros, and rows without tokens follow it."""
    max_decodes, heads = 6, (6, 2, 32)
    query_lens = [1] * len(decodes) + [new for new, _ in prompts] + [padding]
    seq_lens = [*decodes, *(length for _, length in prompts), 0]
    empty = max_decodes + 1 - len(seq_lens)
    inputs = paged_inputs(
        [*query_lens, *[0] * empty], [*seq_lens, *[0] * empty], num_heads=heads[0],
        num_kv_heads=heads[1], head_dim=heads[2], block_size=16,
    )  # fmt: skip
    if sinks:
        options = options | {"sinks": torch.randn(6)}
    options = options | {"scale": inputs.scale}
    workspace = DecodeWorkspace.allocate(
        max_decodes, *heads, dtype=torch.float32, device="cpu", window=options.get("window"),
        min_chunk=32,
    )  # fmt: skip
    num_decodes = torch.tensor([len(decodes)], dtype=torch.int32)
    build_decode_schedule(inputs.seq_lens[:max_decodes], workspace, num_decodes=num_decodes)
    out = torch.full_like(inputs.query, NAN)
    rows = min(max_decodes, len(inputs.query))
    paged_attention_decode(
        inputs.query[:rows], inputs.key_cache, inputs.value_cache, inputs.block_table[:rows],
        inputs.seq_lens[:rows], workspace=workspace, out=out[:rows], **options,
    )  # fmt: skip
    rest = (inputs.key_cache, inputs.value_cache, inputs.block_table, inputs.query_start_loc)
    paged_attention_extend(
        inputs.query, *rest, inputs.seq_lens, max_query_len=len(inputs.query), out=out,
        first_seq=num_decodes, max_seqs=len(prompts) + 1, **options,
    )  # fmt: skip
    wide = tensors(inputs, torch.float64)
    expected = reference.paged_attention_extend(
        *wide, *rest[2:], inputs.seq_lens, max_query_len=90, **options
    )
    total = len(inputs.query) - padding
    assert relative_error(out[:total], expected[:total]) < 1e-6 if total else True
    assert not out[total:].any()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("block_size", [16, 64])
def test_extend_heads_and_blocks(heads: tuple[int, int, int], block_size: int) -> None:
    assert extend_error([19, 1, 5], [19, 40, 37], heads, block_size) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 1}, {"window": 33}, {"window": -24}, {"softcap": 3.0}, EVERYTHING],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_extend_options(dtype: torch.dtype, options: dict[str, Any], sinks: bool) -> None:
    options = options | {"sinks": torch.randn(6) if sinks else None}
    error = extend_error([50, 3, 1], [50, 90, 64], (6, 2, 32), 16, dtype, **options)
    assert error < TOLERANCES[dtype]


@pytest.mark.parametrize(
    "config", [TileConfig(16, 64, 4, 1), TileConfig(64, 16, 4, 1, prefetch=False)]
)
@pytest.mark.parametrize("window", [None, 37, -40, -64])
def test_extend_tiles_larger_and_smaller_than_blocks(config: TileConfig, window: int) -> None:
    error = extend_error([70, 33], [130, 33], (4, 2, 16), 32, config=config, window=window)
    assert error < 1e-6


def test_extend_does_not_touch_rows_outside_its_range() -> None:
    """The first rows of the batch belong to another launch, and the last ones are padding."""
    inputs = paged_inputs(
        [4, 30, 2], [4, 50, 9], num_heads=4, num_kv_heads=2, head_dim=32, block_size=16
    )
    rest = (inputs.block_table[1:2], inputs.query_start_loc[1:3], inputs.seq_lens[1:2])
    options = {"scale": inputs.scale, "max_query_len": 30}
    out = torch.full_like(inputs.query, NAN)
    paged_attention_extend(*tensors(inputs, torch.float32), *rest, **options, out=out)
    expected = torch.full_like(inputs.query, NAN)
    reference.paged_attention_extend(
        *tensors(inputs, torch.float32), *rest, **options, out=expected
    )
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert out[:4].isnan().all() and out[34:].isnan().all() and not out[4:34].isnan().any()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("block_size", [16, 64])
def test_decode_heads_and_blocks(heads: tuple[int, int, int], block_size: int) -> None:
    assert decode_error([70, 0, 1, 33], heads, block_size) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 1}, {"window": 40}, {"window": -48}, {"softcap": 3.0}, EVERYTHING],
)
@pytest.mark.parametrize("query_len", [1, 3])
def test_decode_options(dtype: torch.dtype, options: dict[str, Any], query_len: int) -> None:
    options = options | {"sinks": torch.randn(6)}
    error = decode_error([100, 0, 5, 64], (6, 2, 32), 16, dtype, query_len, **options)
    assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("query_len", [2, 8])
def test_decode_verifies_several_tokens(query_len: int) -> None:
    assert decode_error([90, 8, 0], (4, 2, 32), 32, query_len=query_len) < 1e-6


def test_sinks_that_are_minus_infinity_add_nothing() -> None:
    sinks = torch.full((4,), float("-inf"))
    assert extend_error([9], [40], (4, 2, 32), 16, sinks=sinks) < 1e-6
    assert decode_error([40, 90], (4, 2, 32), 16, sinks=sinks) < 1e-6


def test_scores_far_out_of_the_exponents_range() -> None:
    inputs = paged_inputs([3], [50], num_heads=2, num_kv_heads=1, head_dim=32, block_size=16)
    query, keys, values = tensors(inputs, torch.float32)
    rest = (inputs.block_table, inputs.query_start_loc, inputs.seq_lens)
    expected = reference.paged_attention_extend(
        query.double() * 1e3, keys.double(), values.double(), *rest, scale=1.0, max_query_len=3
    )
    found = paged_attention_extend(query * 1e3, keys, values, *rest, scale=1.0, max_query_len=3)
    assert relative_error(found, expected) < 1e-4
