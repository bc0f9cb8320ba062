"""Check the attention kernels on the GPU against their float64 oracles."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gpu_common import DEVICE, Record, capture

from quire.kernels import reference
from quire.kernels.cuda.attention.cascade import CascadeWorkspace
from quire.kernels.cuda.attention.decode_schedule import DecodeWorkspace, build_decode_schedule
from quire.kernels.cuda.attention.paged_attention_decode import paged_attention_decode
from quire.kernels.cuda.attention.paged_attention_extend import paged_attention_extend
from quire.kernels.cuda.copy_blocks import copy_blocks
from quire.kernels.cuda.reshape_and_cache import reshape_and_cache
from quire.kernels.prefix_groups import PrefixGroup

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))
from paged import PagedInputs, paged_inputs, relative_error, share_prefixes  # noqa: E402

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Maximum relative error by dtype, in the Frobenius norm."""
E4M3 = torch.float8_e4m3fn
NAN = float("nan")
Caches = tuple[torch.Tensor, torch.Tensor | None]


def verdict(dtype: torch.dtype, *errors: float, **facts: object) -> Record:
    """Return the largest error, NaN if any is, and whether it is within the tolerance."""
    error = max(errors) if all(error == error for error in errors) else NAN
    return {"error_norm": error, "limit": TOLERANCES[dtype], "ok": error <= TOLERANCES[dtype]} | {
        name: str(fact) for name, fact in facts.items()
    }


def random_seed() -> int:
    """Draw a seed, so that every run checks other inputs."""
    return int(torch.randint(2**31, (1,)))


def _sinks(num_heads: int, wanted: bool) -> torch.Tensor | None:
    return torch.randn(num_heads, device=DEVICE) if wanted else None


def _stored(
    inputs: PagedInputs, fp8: bool, value_width: int | None = None
) -> tuple[Caches, Caches, torch.Tensor | None]:
    """Return the caches that the kernel reads, those that the oracle reads, and their scales.

    With float8 both read the same bytes, since the error of rounding is not the kernel's. Latents
    have keys only.
    """
    caches = (inputs.key_cache, inputs.value_cache)
    if value_width is not None:
        return (caches[0], None), (caches[0].double(), None), None
    if not fp8:
        return caches, (caches[0].double(), caches[1].double()), None
    scales = torch.rand(2, inputs.key_cache.shape[1], device=DEVICE) * 0.02 + 0.005
    key, value = (
        (cache.float() / scale[:, None, None]).clamp(-448, 448).to(E4M3)
        for cache, scale in zip(caches, scales, strict=True)
    )
    return (key, value), (key, value), scales


def _empty_out(inputs: PagedInputs, value_width: int | None) -> torch.Tensor:
    num_tokens, num_heads, head_dim = inputs.query.shape
    return inputs.query.new_full((num_tokens, num_heads, value_width or head_dim), NAN)


def check_extend(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    block_size: int,
    query_lens: list[int],
    seq_lens: list[int],
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    fp8: bool = False,
    value_width: int | None = None,
) -> Record:
    """Check paged_attention_extend on sequences of these lengths; with a `value_width`, over
    latents."""
    num_heads, num_kv_heads, head_dim = heads
    inputs = paged_inputs(
        query_lens, seq_lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        block_size=block_size, dtype=dtype, device=DEVICE, seed=random_seed(),
    )  # fmt: skip
    tables = (inputs.block_table, inputs.query_start_loc, inputs.seq_lens)
    caches, wide, scales = _stored(inputs, fp8, value_width)
    options = {
        "scale": inputs.scale, "value_width": value_width, "max_query_len": max(query_lens),
        "window": window, "softcap": softcap, "sinks": _sinks(num_heads, sinks),
        "kv_scales": scales,
    }  # fmt: skip
    expected = reference.paged_attention_extend(inputs.query.double(), *wide, *tables, **options)
    out = _empty_out(inputs, value_width)
    paged_attention_extend(inputs.query, *caches, *tables, **options, out=out)
    return verdict(dtype, relative_error(out, expected))


def check_repeats(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    block_size: int,
    query_lens: list[int],
    seq_lens: list[int],
) -> Record:
    """Check that 20 runs of one prefill have equal bits: a result that moves is a race.

    `error_norm` is the share of the later runs that differ from the first.
    """
    num_heads, num_kv_heads, head_dim = heads
    inputs = paged_inputs(
        query_lens, seq_lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        block_size=block_size, dtype=dtype, device=DEVICE, seed=random_seed(),
    )  # fmt: skip
    tables = (inputs.block_table, inputs.query_start_loc, inputs.seq_lens)
    runs = [
        paged_attention_extend(
            inputs.query, inputs.key_cache, inputs.value_cache, *tables, scale=inputs.scale,
            max_query_len=max(query_lens),
        )
        for _ in range(20)
    ]  # fmt: skip
    differ = sum(not torch.equal(run, runs[0]) for run in runs[1:])
    return {"error_norm": differ / 19, "limit": 0.0, "ok": differ == 0}


def check_decode(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    block_size: int,
    seq_lens: list[int],
    query_len: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    min_chunk: int = 256,
    fp8: bool = False,
    value_width: int | None = None,
) -> Record:  # over 50 lines: eager launches and graph replays share all of their inputs
    """Check paged_attention_decode twice eagerly and in a CUDA graph replayed on other lengths.

    The second eager launch shows that the first one left the arrival counters at 0.
    """
    num_heads, num_kv_heads, head_dim = heads
    inputs = paged_inputs(
        [query_len] * len(seq_lens), seq_lens, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, block_size=block_size, dtype=dtype, device=DEVICE, seed=random_seed(),
    )  # fmt: skip
    workspace = DecodeWorkspace.allocate(
        len(seq_lens) + 3, num_heads, num_kv_heads, head_dim, dtype=dtype, device=DEVICE,
        window=window, query_len=query_len, min_chunk=min_chunk, value_width=value_width,
    )  # fmt: skip
    caches, wide, scales = _stored(inputs, fp8, value_width)
    options = {
        "scale": inputs.scale, "window": window, "softcap": softcap, "value_width": value_width,
        "sinks": _sinks(num_heads, sinks), "kv_scales": scales,
    }  # fmt: skip
    lengths = inputs.seq_lens.clone()
    out = _empty_out(inputs, value_width)

    def launch() -> None:
        build_decode_schedule(lengths, workspace)
        paged_attention_decode(
            inputs.query, *caches, inputs.block_table, lengths, workspace=workspace, out=out,
            **options,
        )  # fmt: skip

    def error() -> float:
        expected = reference.paged_attention_decode(
            inputs.query.double(), *wide, inputs.block_table, lengths, **options
        )
        found = relative_error(out, expected)
        out.fill_(NAN)
        workspace.partials.fill_(NAN)
        workspace.log_sums.fill_(NAN)
        return found

    errors = []
    for _ in range(2):
        launch()
        errors.append(error())
    replay = capture(launch)
    for divisor in (1, 3):
        lengths.copy_(torch.where(inputs.seq_lens > 8, inputs.seq_lens // divisor, inputs.seq_lens))
        lengths.clamp_(max=inputs.seq_lens)
        replay()
        errors.append(error())
    leftover = int(workspace.arrived.abs().sum())
    record = verdict(dtype, *errors, errors=errors, leftover=leftover)
    return record | {"ok": record["ok"] and leftover == 0}


def check_cascade(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    groups: list[PrefixGroup],
    seq_lens: list[int],
    fp8: bool = False,
    value_width: int | None = None,
) -> Record:
    """Check shared prefixes against the oracle, which reads each row's own table.

    They run eagerly, then in one graph that is replayed with all groups, the first one, and none.
    """
    num_heads, num_kv_heads, head_dim = heads
    inputs = paged_inputs(
        [1] * len(seq_lens), seq_lens, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, block_size=16, dtype=dtype, device=DEVICE, seed=random_seed(),
    )  # fmt: skip
    share_prefixes(inputs, groups, 16)
    caches, wide, scales = _stored(inputs, fp8, value_width)
    workspace = DecodeWorkspace.allocate(
        len(seq_lens) + 2, *heads, dtype=dtype, device=DEVICE, value_width=value_width
    )
    cascade = CascadeWorkspace.allocate(workspace, dtype=dtype, cache_dtype=caches[0].dtype)
    tables = (inputs.block_table, inputs.seq_lens)
    options = {"scale": inputs.scale, "kv_scales": scales, "value_width": value_width}
    expected = reference.paged_attention_decode(
        inputs.query.double(), *wide, *tables, **options
    )  # fmt: skip
    out = _empty_out(inputs, value_width)

    def launch() -> None:
        build_decode_schedule(inputs.seq_lens, workspace, prefix_lens=cascade.prefix_lens)
        paged_attention_decode(
            inputs.query, *caches, *tables, **options, workspace=workspace, cascade=cascade,
            out=out,
        )  # fmt: skip

    def error() -> float:
        found = relative_error(out, expected)
        for tensor in (out, workspace.partials, cascade.partials, cascade.log_sums):
            tensor.fill_(NAN)
        return found

    cascade.set_groups(groups)
    launch()
    errors = [error()]
    replay = capture(launch)
    for served in (groups, groups[:1], []):
        cascade.set_groups(served)
        replay()
        errors.append(error())
    return verdict(dtype, *errors, errors=errors)


def check_far_blocks() -> Record:
    """Check write, extend, decode and copy on blocks whose element offsets exceed 2³¹."""
    num_heads, num_kv_heads, head_dim, block_size = 32, 8, 128, 16
    num_blocks = 2**31 // (num_kv_heads * block_size * head_dim) + 16
    shape = (1, 2, num_blocks, num_kv_heads, block_size, head_dim)
    kv_cache = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    blocks = torch.arange(num_blocks - 1, num_blocks - 7, -1, device=DEVICE)
    length = 6 * block_size
    slots = (blocks[:, None] * block_size + torch.arange(block_size, device=DEVICE)).flatten()
    keys, values = torch.randn(2, length, num_kv_heads, head_dim, device=DEVICE).bfloat16()
    query = torch.randn(length, num_heads, head_dim, device=DEVICE).bfloat16()
    reshape_and_cache(keys, values, kv_cache[0, 0], kv_cache[0, 1], slots)
    near = torch.arange(6, device=DEVICE)
    copy_blocks(kv_cache, blocks, near)
    copied = torch.equal(kv_cache[:, :, near], kv_cache[:, :, blocks])
    table = blocks.int()[None]
    lens = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
    scale = head_dim**-0.5
    small = (1, num_kv_heads, length, head_dim)
    dense_keys, dense_values = (x.transpose(0, 1).reshape(small)[0] for x in (keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double().transpose(0, 1), dense_keys.double().repeat_interleave(4, 0),
        dense_values.double().repeat_interleave(4, 0), is_causal=True, scale=scale,
    ).transpose(0, 1)  # fmt: skip
    caches = (kv_cache[0, 0], kv_cache[0, 1])
    out = torch.full_like(query, NAN)
    paged_attention_extend(
        query, *caches, table, starts, lens, scale=scale, max_query_len=length, out=out
    )
    workspace = DecodeWorkspace.allocate(
        1, num_heads, num_kv_heads, head_dim, dtype=query.dtype, device=DEVICE
    )
    build_decode_schedule(lens, workspace)
    last = paged_attention_decode(
        query[-1:], *caches, table, lens, scale=scale, workspace=workspace
    )
    errors = (relative_error(out, expected), relative_error(last, expected[-1:]))
    record = verdict(query.dtype, *errors, copied=copied)
    return record | {"ok": record["ok"] and copied}
