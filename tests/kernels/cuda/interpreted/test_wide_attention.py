"""Compare attention over heads wider than 256, and over latents, with the reference in float64.

The tolerance is 1e-6 (float32) and 1e-3 (float16) of the result's Frobenius norm.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from paged import PagedInputs, paged_inputs, relative_error, share_prefixes

from quire.kernels import reference
from quire.kernels.cuda.attention import decode_schedule
from quire.kernels.cuda.attention.cascade import CascadeWorkspace
from quire.kernels.cuda.attention.decode_schedule import DecodeWorkspace, build_decode_schedule
from quire.kernels.cuda.attention.paged_attention_decode import paged_attention_decode
from quire.kernels.cuda.attention.paged_attention_extend import paged_attention_extend
from quire.kernels.cuda.copy_blocks import copy_blocks
from quire.kernels.cuda.reshape_and_cache import reshape_and_cache
from quire.kernels.prefix_groups import PrefixGroup

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3}
NAN = float("nan")
Shape = tuple[int, int, int, int | None]
"""Heads of Q and of K, numbers of a key, and how many of them are its value, if it is a latent."""
WIDE: list[Shape] = [(4, 2, 512, None), (3, 1, 320, None)]
LATENT: list[Shape] = [(16, 1, 576, 512), (5, 1, 80, 64), (20, 1, 288, 256), (80, 1, 56, 32)]
EVERYTHING: dict[str, Any] = {"window": 20, "softcap": 5.0}


def make_inputs(
    query_lens: list[int], seq_lens: list[int], shape: Shape, **how: Any
) -> PagedInputs:
    names = ("num_heads", "num_kv_heads", "head_dim")
    heads = dict(zip(names, shape[:3], strict=True))
    return paged_inputs(query_lens, seq_lens, **heads, **{"block_size": 16} | how)


def tensors(inputs: PagedInputs, shape: Shape, dtype: torch.dtype) -> list[torch.Tensor | None]:
    values = inputs.value_cache.to(dtype) if shape[3] is None else None
    return [inputs.query.to(dtype), inputs.key_cache.to(dtype), values]


def empty_out(inputs: PagedInputs, shape: Shape) -> torch.Tensor:
    width = shape[3] or shape[2]
    return torch.full((*inputs.query.shape[:2], width), NAN, dtype=inputs.query.dtype)


def extend_error(
    query_lens: list[int],
    seq_lens: list[int],
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    **options: Any,
) -> float:
    inputs = make_inputs(query_lens, seq_lens, shape, dtype=dtype, block_size=block_size)
    rest = (inputs.block_table, inputs.query_start_loc, inputs.seq_lens)
    options |= {"scale": inputs.scale, "max_query_len": max(query_lens), "value_width": shape[3]}
    expected = reference.paged_attention_extend(
        *tensors(inputs, shape, torch.float64), *rest, **options
    )
    out = empty_out(inputs, shape)
    paged_attention_extend(*tensors(inputs, shape, dtype), *rest, **options, out=out)
    return relative_error(out, expected)


def decode_error(
    seq_lens: list[int],
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    query_len: int = 1,
    groups: list[PrefixGroup] | None = None,
    **options: Any,
) -> tuple[float, DecodeWorkspace]:
    inputs = make_inputs([query_len] * len(seq_lens), seq_lens, shape, dtype=dtype)
    workspace = DecodeWorkspace.allocate(
        len(seq_lens) + 2, *shape[:3], dtype=dtype, device="cpu", window=options.get("window"),
        query_len=query_len, min_chunk=32, programs_per_sm=1, value_width=shape[3],
    )  # fmt: skip
    workspace.partials.fill_(NAN)
    cascade = None
    if groups is not None:
        share_prefixes(inputs, groups, 16)
        cascade = CascadeWorkspace.allocate(workspace, dtype=dtype)
        cascade.partials.fill_(NAN)
        cascade.set_groups(groups)
    rest = (inputs.block_table, inputs.seq_lens)
    options |= {"scale": inputs.scale, "value_width": shape[3]}
    expected = reference.paged_attention_decode(
        *tensors(inputs, shape, torch.float64), *rest, **options
    )
    launch = functools.partial(
        paged_attention_decode, *tensors(inputs, shape, dtype), *rest, **options,
        workspace=workspace, cascade=cascade,
    )  # fmt: skip
    prefix_lens = None if cascade is None else cascade.prefix_lens
    errors = []
    for _ in range(2):  # the second launch needs the counters that the first one reset
        build_decode_schedule(inputs.seq_lens, workspace, prefix_lens=prefix_lens)
        out = empty_out(inputs, shape)
        launch(out=out)
        errors.append(relative_error(out, expected))
        assert not workspace.arrived.any()
    return max(errors), workspace


@pytest.fixture
def two_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a tile of the decode kernel have two query rows."""
    monkeypatch.setattr(decode_schedule, "decode_rows", lambda *_, **__: 2)
    yield


@pytest.mark.parametrize(
    "shape,block_size",
    [*((shape, 16) for shape in WIDE + LATENT[:3]), (LATENT[3], 64), (WIDE[0], 64)],
)
def test_extend(shape: Shape, block_size: int) -> None:
    error = extend_error([19, 1, 5], [19, 40, 37], shape, block_size=block_size)
    assert error < 1e-6


@pytest.mark.parametrize("shape", [WIDE[0], LATENT[1]])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_extend_options(shape: Shape, dtype: torch.dtype) -> None:
    options = EVERYTHING | {"sinks": torch.randn(shape[0])}
    assert extend_error([50, 1], [90, 64], shape, dtype, **options) < TOLERANCES[dtype]


@pytest.mark.parametrize("shape", [*WIDE, *LATENT])
def test_decode(shape: Shape) -> None:
    error, _ = decode_error([70, 0, 1, 33], shape)
    assert error < 1e-6


@pytest.mark.parametrize("shape", [WIDE[0], LATENT[1]])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("query_len", [1, 3])
def test_decode_options(shape: Shape, dtype: torch.dtype, query_len: int) -> None:
    options = EVERYTHING | {"sinks": torch.randn(shape[0])}
    error, _ = decode_error([100, 0, 5], shape, dtype, query_len, **options)
    assert error < TOLERANCES[dtype]


@pytest.mark.usefixtures("two_rows")
@pytest.mark.parametrize(
    "shape,query_len,share",
    [((8, 2, 320, None), 1, 2), ((6, 1, 80, 64), 1, 3), ((4, 2, 320, None), 2, 2),
     ((3, 1, 80, 64), 4, 3)],
)  # fmt: skip
def test_heads_that_do_not_fit_a_tile_are_cut(shape: Shape, query_len: int, share: int) -> None:
    """Each part reads the keys of its kv head; one head is the smallest part."""
    error, workspace = decode_error([70, 8, 33], shape, query_len=query_len)
    assert workspace.share == share
    assert error < 1e-6


GROUPS = [PrefixGroup((0, 2, 3, 5), 48), PrefixGroup((4, 1), 16)]


@pytest.mark.parametrize("shape", [WIDE[0], LATENT[0], LATENT[1]])
def test_shared_prefixes(shape: Shape) -> None:
    error, _ = decode_error([70, 17, 49, 120, 33, 64], shape, groups=GROUPS)
    assert error < 1e-6


@pytest.mark.usefixtures("two_rows")
@pytest.mark.parametrize("shape", [(8, 2, 320, None), (6, 1, 80, 64)])
def test_shared_prefixes_of_heads_that_are_cut(shape: Shape) -> None:
    error, workspace = decode_error([70, 17, 49, 120, 33, 64], shape, groups=GROUPS)
    assert workspace.share > 1 and error < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_written_and_copied(dtype: torch.dtype) -> None:
    latents = torch.randn(7, 1, 2 * 80)[..., ::2].to(dtype)
    found = torch.zeros(1, 4, 1, 16, 80, dtype=dtype)
    expected = found.clone()
    slots = torch.tensor([3, -1, 17, 40, -7, 39, 0])
    reshape_and_cache(latents, None, found[0], None, slots, value_width=64)
    reference.reshape_and_cache(latents, None, expected[0], None, slots)
    assert torch.equal(found, expected) and found.any()
    cache, ids = torch.stack([found, found + 1]), torch.tensor([0, 1])
    wanted = cache.clone()
    copy_blocks(cache, ids, ids + 2)
    reference.copy_blocks(wanted, ids, ids + 2)
    assert torch.equal(cache, wanted) and not torch.equal(cache[0], found)


@pytest.mark.parametrize(
    "width,value_width,change",
    [
        (576, 512, {"value_cache": torch.zeros(3, 1, 16, 576)}),
        (576, None, {}),
        (520, None, {"value_cache": torch.zeros(3, 1, 16, 520)}),
        (112, 96, {}),
        (1088, 1024, {}),
        (72, 64, {}),
        (144, 64, {}),
        (80, 64, {"key_cache": torch.zeros(3, 2, 16, 80)}),
        (80, 64, {"key_cache": torch.zeros(3, 1, 16, 80).to(torch.float8_e4m3fn)}),
        (80, 64, {"out": torch.zeros(4, 2, 80)}),
    ],
)
def test_refusals(width: int, value_width: int | None, change: dict[str, Any]) -> None:
    """Widths and caches that do not fit are refused before any launch."""
    have: dict[str, Any] = {
        "query": torch.zeros(4, 2, width),
        "key_cache": torch.zeros(3, 1, 16, width),
        "value_cache": None,
        "block_table": torch.zeros(1, 2, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 4], dtype=torch.int32),
        "seq_lens": torch.tensor([4], dtype=torch.int32),
        "scale": 1.0,
        "max_query_len": 4,
        "value_width": value_width,
    }
    with pytest.raises(ValueError, match="value_width|head_dim|kv head|key_cache|out must"):
        paged_attention_extend(**have | change)


def test_a_workspace_for_other_values_is_refused() -> None:
    workspace = DecodeWorkspace.allocate(
        2, 4, 1, 80, dtype=torch.float32, device="cpu", value_width=64
    )
    lens, table = torch.tensor([4], dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    cache = torch.zeros(3, 1, 16, 80)
    with pytest.raises(ValueError, match="workspace"):
        paged_attention_decode(
            torch.zeros(1, 4, 80), cache, cache, table, lens, scale=1.0, workspace=workspace
        )
