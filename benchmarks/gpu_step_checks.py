"""Check what captured steps rely on, on a GPU: mixed steps of any make-up in one graph, the
likeliest tokens, rows rounded to float8, and launches before the kernel that they follow has ended.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gpu_attention_checks import NAN, random_seed, verdict
from gpu_common import DEVICE, Record, capture

from quire.kernels import reference
from quire.kernels.cuda.attention.decode_schedule import DecodeWorkspace, build_decode_schedule
from quire.kernels.cuda.attention.paged_attention_decode import paged_attention_decode
from quire.kernels.cuda.attention.paged_attention_extend import paged_attention_extend
from quire.kernels.cuda.fp8 import quantize_rows
from quire.kernels.cuda.rms_norm import fused_add_rms_norm, rms_norm
from quire.kernels.cuda.sampling.best_tokens import best_tokens
from quire.kernels.cuda.silu_and_mul import silu_and_mul

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))
from paged import paged_inputs, relative_error  # noqa: E402

MAX_DECODES, MAX_PROMPTS = 40, 4
MIXES: list[tuple[list[int], list[tuple[int, int]]]] = [
    ([300, 1, 17, 2049, 64], [(100, 100), (30, 700)]),
    ([], [(200, 1200), (2, 2), (5, 5), (7, 90)]),
    (list(range(1, 400, 10)), []),
    ([900] * 7, [(128, 128)]),
]
"""Lengths of decodes, and new tokens and lengths of prompts, of steps that replay one graph."""


def check_mixed(
    dtype: torch.dtype, heads: tuple[int, int, int], block_size: int, size: int = 256
) -> Record:
    """Check that one captured pair of attention launches serves steps of any make-up, as a mixed
    step of the engine has them: the number of decodes is on the device."""
    num_heads, num_kv_heads, head_dim = heads
    errors: list[float] = []
    workspace = DecodeWorkspace.allocate(MAX_DECODES, *heads, dtype=dtype, device=DEVICE)
    num_decodes = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    steps = [_mix(decodes, prompts, size) for decodes, prompts in MIXES]
    inputs = [
        paged_inputs(
            query_lens, seq_lens, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim, block_size=block_size, dtype=dtype, device=DEVICE,
            seed=random_seed(),
        )
        for query_lens, seq_lens in steps
    ]  # fmt: skip
    # 1. Static tensors, which hold the largest of the steps.
    width = max(one.block_table.shape[1] for one in inputs)
    blocks = max(len(one.key_cache) for one in inputs)
    table = torch.zeros(MAX_DECODES + 1, width, dtype=torch.int32, device=DEVICE)
    loc, lens = torch.zeros_like(inputs[0].query_start_loc), torch.zeros_like(inputs[0].seq_lens)
    query = torch.zeros_like(inputs[0].query)
    shape = (2, blocks, *inputs[0].key_cache.shape[1:])
    caches = torch.zeros(shape, dtype=dtype, device=DEVICE)
    out = torch.empty_like(query)

    def launch() -> None:
        build_decode_schedule(lens[:MAX_DECODES], workspace, num_decodes=num_decodes)
        paged_attention_decode(
            query[:MAX_DECODES], *caches, table[:MAX_DECODES], lens[:MAX_DECODES],
            scale=inputs[0].scale, workspace=workspace, out=out[:MAX_DECODES],
        )  # fmt: skip
        paged_attention_extend(
            query, *caches, table, loc, lens, scale=inputs[0].scale, max_query_len=size, out=out,
            first_seq=num_decodes, max_seqs=MAX_PROMPTS + 1,
        )  # fmt: skip

    # 2. The graph is captured on nothing, then replayed on each step.
    launch()
    replay = capture(launch)
    for one, (decodes, prompts) in zip(inputs, MIXES, strict=True):
        table.zero_()[:, : one.block_table.shape[1]] = one.block_table
        loc.copy_(one.query_start_loc)
        lens.copy_(one.seq_lens)
        query.copy_(one.query)
        caches.fill_(NAN)
        caches[0, : len(one.key_cache)], caches[1, : len(one.key_cache)] = (
            one.key_cache, one.value_cache,
        )  # fmt: skip
        num_decodes.fill_(len(decodes))
        out.fill_(NAN)
        replay()
        real = len(decodes) + sum(new for new, _ in prompts)
        expected = reference.paged_attention_extend(
            one.query.double(), one.key_cache.double(), one.value_cache.double(), one.block_table,
            one.query_start_loc, one.seq_lens, scale=one.scale, max_query_len=size,
        )  # fmt: skip
        errors += [relative_error(out[:real], expected[:real]), float(out[real:].abs().sum())]
    return verdict(dtype, *errors)


def _mix(
    decodes: list[int], prompts: list[tuple[int, int]], size: int
) -> tuple[list[int], list[int]]:
    """Return the new tokens and lengths of a mixed step's rows, padded to `size` tokens."""
    query_lens = [1] * len(decodes) + [new for new, _ in prompts]
    query_lens.append(size - sum(query_lens))
    seq_lens = [*decodes, *(length for _, length in prompts), 0]
    empty = [0] * (MAX_DECODES + 1 - len(seq_lens))
    return query_lens + empty, seq_lens + empty


def check_best_tokens(dtype: torch.dtype, rows: int, vocab_size: int) -> Record:
    """Check the likeliest tokens against torch's; `error_norm` is the share of rows that differ."""
    logits = torch.randn(rows, vocab_size, device=DEVICE).to(dtype)
    logits[:, ::5] = logits[:, 1:2]  # ties
    logits[0, vocab_size // 2] = NAN
    found, wanted = [
        (logits[:, 0].clone(), torch.zeros(rows, dtype=torch.int64, device=DEVICE),
         torch.zeros(rows, dtype=torch.bool, device=DEVICE))
        for _ in range(2)
    ]  # fmt: skip
    best_tokens(logits, *found)
    reference.best_tokens(logits, *wanted)
    differ = sum(int((a != b).sum()) for a, b in zip(found, wanted, strict=True))
    return {"error_norm": differ / rows, "limit": 0.0, "ok": differ == 0}


def check_quantize_rows(dtype: torch.dtype, rows: int, size: int) -> Record:
    """Check float8 rows against torch's, bit by bit; `error_norm` is the share that differs."""
    x = (torch.randn(rows, size, device=DEVICE) * 30).to(dtype)
    found, wanted = [
        (x.to(torch.float8_e4m3fn), torch.zeros(rows, 1, device=DEVICE)) for _ in range(2)
    ]
    quantize_rows(x, *found)
    reference.quantize_rows(x, *wanted)
    differ = int((found[0].view(torch.uint8) != wanted[0].view(torch.uint8)).sum())
    differ += int((found[1] != wanted[1]).sum())
    return {"error_norm": differ / x.numel(), "limit": 0.0, "ok": differ == 0}


def check_dependent_launches(dtype: torch.dtype, rows: int, size: int) -> Record:
    """Check that a captured chain of dependent launches gives the bits of the same chain launched
    as usual, over and over: each kernel reads what the one before it has just written."""
    weight = torch.randn(size, device=DEVICE).to(dtype)
    start = torch.randn(rows, 2 * size, device=DEVICE).to(dtype)
    results = []
    for pdl in (False, True):
        x, y = start[:, :size].clone(), start[:, size:].clone()

        def launch(x: torch.Tensor = x, y: torch.Tensor = y, pdl: bool = pdl) -> None:
            for _ in range(20):
                fused_add_rms_norm(x, y, weight, eps=1e-6, pdl=pdl)
                y.copy_(rms_norm(x, weight, eps=1e-6, pdl=pdl))
                both = torch.cat([x, y], dim=1)
                silu_and_mul(both, out=x, pdl=pdl)
                rms_norm(x, weight, eps=1e-6, out=y, pdl=pdl)

        replay = capture(launch)
        for _ in range(10):
            x.copy_(start[:, :size])
            y.copy_(start[:, size:])
            replay()
        results += [x, y]
    differ = sum(int((a != b).sum()) for a, b in zip(results[:2], results[2:], strict=True))
    return {"error_norm": differ / start.numel(), "limit": 0.0, "ok": differ == 0}
