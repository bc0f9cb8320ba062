"""Check every kernel on the GPU against its float64 oracle; outputs and scratch start as NaN."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from gpu_attention_checks import (
    E4M3,
    NAN,
    check_cascade,
    check_decode,
    check_extend,
    check_far_blocks,
    check_repeats,
    random_seed,
    verdict,
)
from gpu_blocks import check_host_blocks
from gpu_common import DEVICE, Case, Record, make_sequence
from gpu_experts import QWEN3_MOE, check_experts
from gpu_lora import check_adapters, figures_of
from gpu_products import check_float8, check_product
from gpu_states import RECURRENCES, check_convolution, check_recurrence
from gpu_step_checks import (
    check_best_tokens,
    check_dependent_launches,
    check_mixed,
    check_quantize_rows,
)

from quire.engine.devices.cuda.draws import CudaDraws
from quire.engine.sampling.sampler import Sampler
from quire.kernels import reference
from quire.kernels.cuda.copy_blocks import copy_blocks
from quire.kernels.cuda.prepare_inputs import prepare_inputs
from quire.kernels.cuda.reshape_and_cache import reshape_and_cache
from quire.kernels.cuda.rms_norm import fused_add_rms_norm, rms_norm
from quire.kernels.cuda.rope_and_cache import rope_and_cache
from quire.kernels.cuda.silu_and_mul import silu_and_mul
from quire.kernels.prefix_groups import PrefixGroup

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))
from packed import packed_step  # noqa: E402
from paged import relative_error  # noqa: E402

FILTERS: list[dict[str, float]] = [
    {}, {"min_p": 0.05}, {"top_k": 1}, {"top_k": 20, "top_p": 0.95}, {"top_k": 1024, "top_p": 0.5},
    {"top_k": 40, "min_p": 0.1}, {"top_k": 5000}, {"top_k": 3000, "top_p": 0.8}, {"top_p": 0.9},
    {"top_p": 0.999}, {"top_p": 1e-6},
]  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_sampling(dtype: torch.dtype, vocab_size: int, rows: int) -> Record:
    """Check draws with every filter, at several spreads of the logits, against the torch sampler.

    `error_norm` is the share of rows with another token. Both paths call the same functions; if a
    compiler rounds one of them differently, about one row in a million may differ.
    """
    device = torch.device(DEVICE)
    differ = drawn = 0
    for spread, temperature in ((0.3, 1.0), (3.0, 0.6), (2.0, 1.7)):
        sequences = [
            make_sequence(index, FILTERS[index % len(FILTERS)] | {"temperature": temperature})
            for index in range(rows)
        ]
        logits = (torch.randn(rows, vocab_size, device=DEVICE) * spread).to(dtype)
        logits[:, ::7] = logits[:, 3:4]  # ties
        tokens = []
        for draws in (None, CudaDraws()):
            sampler = Sampler(vocab_size, device, draws)
            tokens.append(sampler(logits, sampler.prepare(sequences)).token_ids)
        differ += int((tokens[0] != tokens[1]).sum())
        drawn += rows
    error = differ / drawn
    return {"error_norm": error, "limit": 1e-3, "ok": error <= 1e-3, "rows": drawn}


def check_inputs(
    starts: list[int], lengths: list[int], padding: int = 0, changed: float = 0.5
) -> Record:
    """Check prepare_inputs bit by bit; `error_norm` is the share of numbers that differ."""
    differ = count = 0
    for block_size in (16, 64):
        step = packed_step(
            starts, lengths, block_size=block_size, padding=padding, changed=changed,
            device=DEVICE, seed=random_seed(),
        )  # fmt: skip
        pairs = zip(step.run(prepare_inputs), step.run(reference.prepare_inputs), strict=True)
        for found, expected in pairs:
            differ += int((found != expected).sum())
            count += found.numel()
    return {"error_norm": differ / count, "limit": 0.0, "ok": differ == 0}


def check_fp8_write(dtype: torch.dtype, heads: tuple[int, int, int]) -> Record:
    """Check that float8 writes store the bytes that torch converts to.

    Rotated K may round to the neighbouring number.
    """
    num_heads, num_kv_heads, head_dim = heads
    slots = torch.randperm(9 * 16, device=DEVICE)[:77]
    slots[::5] = -1
    query = torch.randn(77, num_heads, head_dim, device=DEVICE).to(dtype)
    key, value = (torch.randn(2, 77, num_kv_heads, head_dim, device=DEVICE) * 40).to(dtype)
    angles = torch.randn(77, head_dim // 2, device=DEVICE).repeat(1, 2)
    scales = torch.rand(2, num_kv_heads, device=DEVICE) + 0.05  # some saturate
    shape = (2, 2, 9, num_kv_heads, 16, head_dim)
    found, wanted = (torch.zeros(shape, device=DEVICE).to(E4M3) for _ in range(2))
    rotary = (angles.cos(), angles.sin())
    reshape_and_cache(key, value, *found[0], slots, kv_scales=scales)
    reference.reshape_and_cache(key, value, *wanted[0], slots, kv_scales=scales)
    rope_and_cache(query, key, value, *found[1], slots, *rotary, kv_scales=scales)
    reference.rope_and_cache(query, key, value, *wanted[1], slots, *rotary, kv_scales=scales)
    rotated, expected = found[1, 0].float(), wanted[1, 0].float()
    near = bool(((rotated - expected).abs() <= expected.abs() / 7).all())
    differ = float((rotated != expected).float().mean())
    bytes_equal = torch.equal(found[0].view(torch.uint8), wanted[0].view(torch.uint8))
    values_equal = torch.equal(found[1, 1].view(torch.uint8), wanted[1, 1].view(torch.uint8))
    exact = bytes_equal and values_equal and near
    return {"error_norm": differ, "limit": 0.02, "ok": exact and differ <= 0.02, "exact": exact}


def check_write(dtype: torch.dtype, heads: tuple[int, int, int], block_size: int) -> Record:
    """Check the cache writes and copy_blocks with strided rows and padding slots."""
    num_heads, num_kv_heads, head_dim = heads
    num_tokens, num_blocks = 77, 9
    slots = torch.randperm(num_blocks * block_size, device=DEVICE)[:num_tokens]
    slots[::5] = -1
    query = torch.randn(num_tokens, num_heads, head_dim, device=DEVICE).to(dtype)
    key, value = torch.randn(2, num_kv_heads, num_tokens, head_dim, device=DEVICE).to(dtype)
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    angles = torch.randn(num_tokens, head_dim // 4, device=DEVICE).repeat(1, 2)
    rotary = (angles.cos(), angles.sin())
    weights = {"query_weight": torch.randn(head_dim, device=DEVICE)}
    weights["key_weight"] = torch.randn(head_dim, device=DEVICE)
    shape = (2, 2, num_blocks, num_kv_heads, block_size, head_dim)
    caches = torch.zeros(shape, dtype=dtype, device=DEVICE)
    wanted = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    wide = [tensor.double() for tensor in (query, key, value)]
    reshape_and_cache(key, value, caches[0, 0], caches[0, 1], slots)
    reference.reshape_and_cache(wide[1], wide[2], wanted[0, 0], wanted[0, 1], slots)
    out = torch.full_like(query, NAN)
    rope_and_cache(
        query, key, value, caches[1, 0], caches[1, 1], slots, *rotary, **weights, out=out
    )
    expected = reference.rope_and_cache(
        *wide, wanted[1, 0], wanted[1, 1], slots, *rotary, **weights
    )
    sources = torch.tensor([1, 1, 4], device=DEVICE)
    destinations = torch.tensor([0, 5, 2], device=DEVICE)
    copy_blocks(caches, sources, destinations)
    reference.copy_blocks(wanted, sources, destinations)
    return verdict(dtype, relative_error(out, expected), relative_error(caches, wanted))


def check_rows(dtype: torch.dtype, num_rows: int, size: int) -> Record:
    """Check both norms with both weight conventions, and the gated activation."""
    x, residual = torch.randn(2, num_rows, size, device=DEVICE).to(dtype)
    weight = torch.randn(size, device=DEVICE).to(dtype)
    errors = []
    for plus_one in (False, True):
        options = {"eps": 1e-6, "plus_one": plus_one}
        out = rms_norm(x, weight, **options, out=torch.full_like(x, NAN))
        wide = reference.rms_norm(x.double(), weight.double(), **options)
        errors.append(relative_error(out, wide))
        have, want = (x.clone(), residual.clone()), (x.clone(), residual.clone())
        fused_add_rms_norm(*have, weight, **options)
        reference.fused_add_rms_norm(*want, weight, **options)
        errors += [relative_error(a, b) for a, b in zip(have, want, strict=True)]
    out = silu_and_mul(x)
    errors.append(relative_error(out, reference.silu_and_mul(x.double())))
    return verdict(dtype, *errors)


def check_lora(
    dtype: torch.dtype, rows: int, slots: int, rank: int, features: int, sizes: tuple[int, ...]
) -> Record:
    """Check what LoRA adapters add; rows without one must not change."""
    out, wanted, untouched = check_adapters(dtype, rows, slots, rank, features, sizes)
    return figures_of(verdict(dtype, relative_error(out, wanted)), untouched)


def check_states(dtype: torch.dtype, channels: int, heads: tuple[int, int, int, int]) -> Record:
    """Check the convolution, and the recurrence with the delta rule and without it. States are
    float32 whatever the dtype is."""
    errors = []
    for found in (
        check_convolution(dtype, channels, 4),
        *(
            check_recurrence(dtype, heads, has_beta, form)
            for has_beta in (True, False)
            for form in RECURRENCES
        ),
    ):
        out, wanted, states, expected = found
        errors += [relative_error(out, wanted), relative_error(states, expected)]
    return verdict(dtype, *errors)


def cases() -> list[Case]:  # over 50 lines: it is a list
    """Return the cases, the simplest first and half-precision dtypes before float32."""
    found: list[Case] = []

    def add(name: str, function: object, *args: object, **options: object) -> None:
        found.append(Case(name, functools.partial(function, *args, **options)))  # type: ignore[arg-type]

    lens = [300, 0, 1, 17, 2049, 64, 1000]
    queries, contexts = [37, 1, 300, 64, 129], [37, 50, 300, 1000, 1153]
    llama, qwen = (32, 8, 128), (14, 2, 64)
    decodes = list(range(0, 2560, 10))
    add("inputs decodes", check_inputs, decodes, [1] * 256)
    add("inputs decodes, padded", check_inputs, decodes[:9], [1] * 9, padding=7, changed=0.1)
    add("inputs mixed", check_inputs, [99, 40_000, 0, 500, 3], [1, 1, 8192, 300, 1025])
    for dtype in DTYPES:
        tag = str(dtype).removeprefix("torch.")
        add(f"{tag} write", check_write, dtype, llama, 16)
        add(f"{tag} rows", check_rows, dtype, 33, 4096)
        add(f"{tag} lora", check_lora, dtype, 70, 4, 16, 4096, (4096, 1024, 1024))
        add(f"{tag} lora odd", check_lora, dtype, 19, 3, 70, 1000, (130, 7))
        add(f"{tag} states", check_states, dtype, 8192, (16, 32, 128, 128))
        for kind, num_rows, group in (("int4", 1, 128), ("int8", 70, 32), ("float8", 300, 4096)):
            add(f"{tag} product {kind}", check_product, dtype, kind, num_rows, 1000, 4096, group)
        for num_tokens in (1, 300, 1200):
            add(f"{tag} experts {num_tokens}", check_experts, dtype, num_tokens, QWEN3_MOE)
        add(f"{tag} experts clamped", check_experts, dtype, 77, (8, 4, 1000, 360), (7.0, 1.702))
        add(f"{tag} extend llama b16", check_extend, dtype, llama, 16, queries, contexts)
        add(f"{tag} decode llama b16", check_decode, dtype, llama, 16, lens)
        if dtype == torch.bfloat16:
            add(f"{tag} blocks to host memory", check_host_blocks, dtype, 8, 128)
            add(f"{tag} extend 20 times", check_repeats, dtype, llama, 16, queries, contexts)
            add(f"{tag} mixed steps g7 d64", check_mixed, dtype, qwen, 16)
            add(f"{tag} dependent launches", check_dependent_launches, dtype, 8, 1024)
        add(f"{tag} mixed steps llama", check_mixed, dtype, llama, 16)
        add(f"{tag} best tokens", check_best_tokens, dtype, 33, 151_936)
        add(f"{tag} float8 rows", check_quantize_rows, dtype, 33, 4096)
        add(f"{tag} extend g7 d64 b64", check_extend, dtype, qwen, 64, queries, contexts)
        add(f"{tag} decode g7 d64 b64", check_decode, dtype, qwen, 64, lens)
        every = {"window": 100, "softcap": 20.0, "sinks": True}
        add(f"{tag} extend window+cap+sinks d80", check_extend, dtype, (8, 4, 80), 32, queries,
            contexts, **every)  # fmt: skip
        add(f"{tag} decode window+cap+sinks d80", check_decode, dtype, (8, 4, 80), 32, lens,
            **every, min_chunk=32)  # fmt: skip
        add(f"{tag} decode q4 window d128", check_decode, dtype, llama, 32,
            [300, 4, 0, 2049, 64], query_len=4, window=500, min_chunk=128)  # fmt: skip
        tile_groups = [PrefixGroup((0, 2, 3, 5, 6), 512), PrefixGroup((7, 1), 128)]
        members = [700, 170, 549, 1200, 0, 640, 513, 333]
        if dtype == torch.bfloat16:
            add(f"{tag} fp8 write", check_fp8_write, dtype, llama)
            for heads, name in ((llama, "llama"), (qwen, "g7 d64")):
                add(f"{tag} fp8 extend {name}", check_extend, dtype, heads, 16, queries, contexts,
                    fp8=True)  # fmt: skip
                add(f"{tag} fp8 decode {name}", check_decode, dtype, heads, 16, lens, fp8=True)
                add(f"{tag} cascade {name}", check_cascade, dtype, heads, tile_groups, members)
            add(f"{tag} fp8 cascade llama", check_cascade, dtype, llama, tile_groups, members,
                fp8=True)  # fmt: skip
            add(f"{tag} sampling 151936", check_sampling, dtype, 151_936, 256)
            add("far blocks", check_far_blocks)
            add(f"{tag} product float8 torch", check_float8, 37, 1024, 4096)
            add(f"{tag} decode long", check_decode, dtype, llama, 64, [20000, 5])
            add(f"{tag} decode 70 rows", check_decode, dtype, llama, 16, list(range(0, 700, 10)))
            add(f"{tag} extend short rows", check_extend, dtype, llama, 16, [3, 9, 1], [500, 9, 1])
            add(f"{tag} extend mqa16 d128", check_extend, dtype, (16, 1, 128), 128, queries,
                contexts)  # fmt: skip
            add(f"{tag} decode mqa16 sinks", check_decode, dtype, (16, 1, 128), 128, lens,
                sinks=True)  # fmt: skip
            add(f"{tag} rows odd", check_rows, dtype, 7, 1000)
            add(f"{tag} sampling 1001", check_sampling, dtype, 1001, 64)
        else:
            add(f"{tag} fp8 decode g7 d64", check_decode, dtype, qwen, 16, lens, fp8=True)
            add(f"{tag} cascade llama", check_cascade, dtype, llama, tile_groups, members)
            add(f"{tag} sampling 128256", check_sampling, dtype, 128_256, 64)
        add(f"{tag} extend d256 b16", check_extend, dtype, (8, 4, 256), 16, queries, contexts)
        add(f"{tag} decode d256 b16", check_decode, dtype, (8, 4, 256), 16, lens)
        add(f"{tag} extend d512", check_extend, dtype, (16, 2, 512), 16, queries, contexts)
        add(f"{tag} decode d512", check_decode, dtype, (16, 2, 512), 16, lens)
        add(f"{tag} decode q8 d512", check_decode, dtype, (16, 2, 512), 16,
            [300, 8, 0, 2049], query_len=8)  # fmt: skip
        add(f"{tag} cascade d512", check_cascade, dtype, (16, 2, 512), tile_groups, members)
        for num_heads in (16, 20, 128):
            latents = (num_heads, 1, 576)
            add(f"{tag} extend latents h{num_heads}", check_extend, dtype, latents, 16, queries,
                contexts, value_width=512)  # fmt: skip
            add(f"{tag} decode latents h{num_heads}", check_decode, dtype, latents, 16, lens,
                value_width=512)  # fmt: skip
        add(f"{tag} cascade latents h16", check_cascade, dtype, (16, 1, 576), tile_groups, members,
            value_width=512)  # fmt: skip
        add(f"{tag} write d80 b64", check_write, dtype, (7, 7, 80), 64)
    return found
