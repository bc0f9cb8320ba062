"""Measure the device's limits, and every kernel's time beside them and beside torch's kernels."""

from __future__ import annotations

import contextlib
import functools
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from gpu_common import (
    DEVICE,
    GEMMA_26B,
    LLAMA_8B,
    QWEN_06B,
    Case,
    PagedBatch,
    Record,
    Shape,
    make_sequence,
    mixed_lengths,
    paged_batch,
    time_graph,
)
from gpu_experts import time_experts
from gpu_lora import calls_of_adapters
from gpu_products import time_product
from gpu_states import RECURRENCES, calls_of_prompt, calls_of_states
from torch.nn.attention import SDPBackend, sdpa_kernel

from quire.engine.devices.cuda.draws import CudaDraws
from quire.engine.sampling.sampler import Sampler
from quire.kernels.cuda.attention.cascade import CascadeWorkspace
from quire.kernels.cuda.attention.decode_schedule import (
    MIN_CHUNK,
    PROGRAMS_PER_SM,
    DecodeWorkspace,
    build_decode_schedule,
)
from quire.kernels.cuda.attention.paged_attention_decode import paged_attention_decode
from quire.kernels.cuda.attention.paged_attention_extend import paged_attention_extend
from quire.kernels.cuda.copy_blocks import copy_blocks
from quire.kernels.cuda.prepare_inputs import prepare_inputs
from quire.kernels.cuda.reshape_and_cache import reshape_and_cache
from quire.kernels.cuda.rms_norm import fused_add_rms_norm, rms_norm
from quire.kernels.cuda.rope_and_cache import rope_and_cache
from quire.kernels.cuda.sampling import sample_tokens
from quire.kernels.cuda.silu_and_mul import silu_and_mul
from quire.kernels.cuda.tuning import TileConfig
from quire.kernels.prefix_groups import PrefixGroup

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))
from packed import packed_step  # noqa: E402

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
SAMPLED: dict[str, dict[str, float]] = {
    "whole": {}, "top_k+p": {"top_k": 50, "top_p": 0.95}, "top_p": {"top_p": 0.95},
}  # fmt: skip


def _figures(seconds: float, *, num_bytes: float = 0, flops: float = 0) -> Record:
    """Return microseconds, and GB/s and TFLOP/s where bytes and FLOPs are given."""
    record: Record = {"us": seconds * 1e6}
    if num_bytes:
        record["gb_s"] = num_bytes / seconds / 1e9
    if flops:
        record["tflop_s"] = flops / seconds / 1e12
    return record


def limit_copy() -> Record:
    """Measure the bandwidth of a copy."""
    source = torch.empty(2**31, dtype=BF16, device=DEVICE)
    target = torch.empty_like(source)
    seconds = time_graph([lambda: target.copy_(source)])
    return _figures(seconds, num_bytes=2 * source.numel() * 2)


def limit_read() -> Record:
    """Measure the bandwidth of a reduction, which only reads, as decode does.

    The writes of a copy cost bus turnarounds.
    """
    source = torch.zeros(2**30, dtype=torch.float32, device=DEVICE)
    return _figures(time_graph([lambda: source.sum()]), num_bytes=source.numel() * 4)


def limit_matmul() -> Record:
    """Measure the speed of a large bf16 matmul."""
    a, b = torch.randn(2, 8192, 8192, device=DEVICE).to(BF16)
    out = torch.empty_like(a)
    seconds = time_graph([lambda: torch.mm(a, b, out=out)] * 5)
    return _figures(seconds, flops=2 * 8192**3)


def time_decode(
    shape: Shape,
    block_size: int,
    lengths: tuple[int, ...],
    config: TileConfig | None = None,
    programs_per_sm: int = PROGRAMS_PER_SM,
    min_chunk: int = MIN_CHUNK,
    dtype: torch.dtype = BF16,
) -> Record:
    """Time one layer's decode attention, with a schedule built beforehand."""
    batch = paged_batch(shape, block_size, lengths, dtype=dtype)
    workspace = DecodeWorkspace.allocate(
        len(lengths), shape.num_heads, shape.num_kv_heads, shape.head_dim, dtype=BF16,
        device=DEVICE, config=config, programs_per_sm=programs_per_sm, min_chunk=min_chunk,
        value_width=shape.value_width,
    )  # fmt: skip
    query = torch.randn(len(lengths), shape.num_heads, shape.head_dim, device=DEVICE).to(BF16)
    out = torch.empty_like(query[..., : shape.value_width])
    build_decode_schedule(batch.seq_lens, workspace)

    def call(layer: int) -> None:
        paged_attention_decode(
            query, *batch.layer(layer), batch.block_table, batch.seq_lens,
            scale=shape.head_dim**-0.5, workspace=workspace, out=out,
            value_width=shape.value_width,
        )  # fmt: skip

    return _figures(time_graph(_over_layers(batch, call)), num_bytes=batch.kv_bytes)


def time_shared(
    shape: Shape,
    members: int,
    prefix: int,
    own: int,
    cascade: bool,
    dtype: torch.dtype = BF16,
    config: TileConfig | None = None,
) -> Record:
    """Time one layer's decode attention of sequences that share a prefix.

    The bytes are those that must be read: the prefix once, and each sequence's own keys.
    """
    batch = paged_batch(shape, 16, (prefix + own,) * members, shared=prefix, dtype=dtype)
    workspace = DecodeWorkspace.allocate(
        members, shape.num_heads, shape.num_kv_heads, shape.head_dim, dtype=BF16, device=DEVICE
    )
    groups = None
    if cascade:
        groups = CascadeWorkspace.allocate(
            workspace, dtype=BF16, cache_dtype=dtype, config=config
        )  # fmt: skip
        groups.set_groups([PrefixGroup(tuple(range(members)), prefix)])
    query = torch.randn(members, shape.num_heads, shape.head_dim, device=DEVICE).to(BF16)
    out = torch.empty_like(query)
    build_decode_schedule(
        batch.seq_lens, workspace, prefix_lens=None if groups is None else groups.prefix_lens
    )

    def call(layer: int) -> None:
        paged_attention_decode(
            query, *batch.layer(layer), batch.block_table, batch.seq_lens,
            scale=shape.head_dim**-0.5, workspace=workspace, cascade=groups, out=out,
        )  # fmt: skip

    needed = batch.kv_bytes * (prefix + members * own) // (members * (prefix + own))
    return _figures(time_graph(_over_layers(batch, call)), num_bytes=needed)


def time_sampling(
    vocab_size: int,
    rows: int,
    params: dict[str, float],
    kernel: bool = True,
    tile: tuple[int, int, int] | None = None,
) -> Record:
    """Time a call of the sampler, its argmax included, on bf16 logits.

    The bytes are those of reading the logits once. `tile` sets BLOCK, SEARCH_BLOCK and NUM_WARPS of
    the kernel.
    """
    names = ("BLOCK", "SEARCH_BLOCK", "NUM_WARPS")
    with contextlib.ExitStack() as stack:
        for name, value in zip(names, tile or (), strict=False):
            stack.enter_context(mock.patch.object(sample_tokens, name, value))
        count = max(2, min(16, int(2e8 // (rows * vocab_size * 2))))
        logits = torch.randn(count, rows, vocab_size, device=DEVICE, dtype=BF16).mul_(2.5)
        drawer = Sampler(vocab_size, logits.device, CudaDraws() if kernel else None)
        batch = drawer.prepare([make_sequence(index, params) for index in range(rows)])
        calls = [functools.partial(drawer, logits[index], batch) for index in range(count)]
        return _figures(time_graph(calls), num_bytes=rows * vocab_size * 2)


def _over_layers(batch: PagedBatch, call: object) -> list[functools.partial[None]]:
    return [functools.partial(call, layer) for layer in range(max(4, batch.num_layers))]  # type: ignore[arg-type]


def time_schedule(num_seqs: int, length: int) -> Record:
    """Time the decode schedule of sequences of one length."""
    workspace = DecodeWorkspace.allocate(num_seqs, 32, 8, 128, dtype=BF16, device=DEVICE)
    seq_lens = torch.full((num_seqs,), length, dtype=torch.int32, device=DEVICE)
    return _figures(time_graph([lambda: build_decode_schedule(seq_lens, workspace)] * 50))


def time_inputs(starts: list[int], lengths: list[int], changed: float) -> Record:
    """Time `prepare_inputs` without the upload; a share `changed` of the rows has new blocks."""
    step = packed_step(starts, lengths, changed=changed, device=DEVICE)
    return _figures(time_graph([lambda: step.launch(prepare_inputs)] * 50))


def time_sdpa_decode(shape: Shape, count: int, length: int) -> Record:
    """Time torch's attention on contiguous K and V that the heads of a group share."""
    size = (count, shape.num_kv_heads, length, shape.head_dim)
    layers = max(2, min(16, int(2.6e8 // (size[0] * size[1] * length * size[3] * 4)) + 1))
    caches = [torch.randn(2, *size, device=DEVICE, dtype=BF16) for _ in range(layers)]
    query = torch.randn(count, shape.num_heads, 1, shape.head_dim, device=DEVICE, dtype=BF16)
    calls = [
        functools.partial(
            torch.nn.functional.scaled_dot_product_attention, query, *cache, enable_gqa=True
        )
        for cache in caches
    ]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        return _figures(time_graph(calls), num_bytes=caches[0].numel() * 2)


def causal_flops(shape: Shape, query_len: int, length: int) -> float:
    """Return 4 · heads · head_dim FLOPs per visible pair: both matmuls, the causal half only."""
    pairs = query_len * (length - query_len) + query_len * (query_len + 1) / 2
    return 4 * shape.num_heads * shape.head_dim * pairs


def time_extend(
    shape: Shape,
    block_size: int,
    query_len: int,
    length: int,
    count: int = 1,
    config: TileConfig | None = None,
    dtype: torch.dtype = BF16,
    in_order: bool = False,
) -> Record:
    """Time one layer's prefill of `count` sequences, each with query_len new tokens."""
    batch = paged_batch(shape, block_size, (length,) * count, dtype=dtype, in_order=in_order)
    query = torch.randn(count * query_len, shape.num_heads, shape.head_dim, device=DEVICE).to(BF16)
    starts = torch.arange(count + 1, dtype=torch.int32, device=DEVICE) * query_len
    out = torch.empty_like(query)

    def call(layer: int) -> None:
        paged_attention_extend(
            query, *batch.layer(layer), batch.block_table, starts, batch.seq_lens,
            scale=shape.head_dim**-0.5, max_query_len=query_len, out=out, config=config,
        )  # fmt: skip

    calls = [functools.partial(call, layer) for layer in range(4)]
    return _figures(time_graph(calls, 5), flops=count * causal_flops(shape, query_len, length))


def time_sdpa_extend(shape: Shape, length: int, backend: SDPBackend) -> Record:
    """Time torch's causal attention over one prompt, with K and V repeated for each head."""
    query, key, value = (
        torch.randn(1, heads, length, shape.head_dim, device=DEVICE, dtype=BF16)
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    group = shape.num_heads // shape.num_kv_heads
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    call = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, query, key, value, is_causal=True
    )
    with sdpa_kernel([backend]):
        return _figures(time_graph([call] * 4, 5), flops=causal_flops(shape, length, length))


def time_write(shape: Shape, num_tokens: int, rope: bool) -> Record:
    """Time one layer's KV cache write; with `rope` also the norms and rotation of Q and K."""
    block_size, num_layers = 16, 8
    num_blocks = max(4096, 2 * num_tokens // block_size)
    size = (num_layers, 2, num_blocks, shape.num_kv_heads, block_size, shape.head_dim)
    kv_cache = torch.empty(size, dtype=BF16, device=DEVICE)
    kv_heads, heads, dim = shape.num_kv_heads, shape.num_heads, shape.head_dim
    packed = torch.randn(4, num_tokens, heads + 2 * kv_heads, dim, device=DEVICE).to(BF16)
    slots = torch.randperm(num_blocks * block_size, device=DEVICE)[:num_tokens]
    cos = torch.randn(num_tokens, dim, device=DEVICE).to(BF16)
    weight = torch.randn(dim, device=DEVICE).to(BF16)
    out = torch.empty(num_tokens, heads, dim, dtype=BF16, device=DEVICE)

    def call(layer: int) -> None:
        query, key, value = packed[layer % 4].split([heads, kv_heads, kv_heads], dim=1)
        caches = (kv_cache[layer, 0], kv_cache[layer, 1])
        if rope:
            rope_and_cache(query, key, value, *caches, slots, cos, cos, query_weight=weight,
                           key_weight=weight, out=out)  # fmt: skip
        else:
            reshape_and_cache(key, value, *caches, slots)

    calls = [functools.partial(call, layer) for layer in range(num_layers)] * 4
    moved = 2 * num_tokens * (2 * kv_heads + (heads if rope else 0)) * dim * 2
    return _figures(time_graph(calls), num_bytes=moved)


def time_copy_blocks(shape: Shape, pairs: int, block_size: int) -> Record:
    """Time copies of this many blocks in 32 layers."""
    num_layers, num_blocks = 32, max(1024, 4 * pairs)
    size = (num_layers, 2, num_blocks, shape.num_kv_heads, block_size, shape.head_dim)
    kv_cache = torch.empty(size, dtype=BF16, device=DEVICE).normal_()
    order = torch.randperm(num_blocks, device=DEVICE)
    starts = range(0, num_blocks - 2 * pairs + 1, 2 * pairs)
    calls = [
        functools.partial(
            copy_blocks, kv_cache, order[at : at + pairs], order[at + pairs : at + 2 * pairs]
        )
        for at in list(starts)[:16]
    ]
    moved = 2 * pairs * kv_cache[:, :, 0].numel() * 2
    return _figures(time_graph(calls), num_bytes=moved)


def time_rows(kind: str, num_rows: int, size: int) -> Record:
    """Time a norm or the activation."""
    width = 2 * size if kind == "silu_and_mul" else size
    count = max(4, min(32, int(2e8 // (num_rows * width * 2))))
    inputs = torch.randn(count, num_rows, width, device=DEVICE, dtype=BF16)
    residual, out = torch.zeros(2, num_rows, size, device=DEVICE, dtype=BF16)
    weight = torch.randn(size, device=DEVICE, dtype=BF16)
    kinds = {
        "rms_norm": (lambda x: rms_norm(x, weight, eps=1e-6, out=out), 2),
        "fused_add_rms_norm": (lambda x: fused_add_rms_norm(x, residual, weight, eps=1e-6), 4),
        "silu_and_mul": (lambda x: silu_and_mul(x, out=out), 3),
    }
    function, passes = kinds[kind]
    calls = [functools.partial(function, inputs[index]) for index in range(count)]
    return _figures(time_graph(calls), num_bytes=passes * num_rows * size * 2)


def time_lora(rows: int, slots: int, rank: int) -> Record:
    """Time what adapters add to Q, K and V of Llama 3.1 8B."""
    calls, moved = calls_of_adapters(rows, slots, rank, 4096, (4096, 1024, 1024))
    # The figures are those of one shrink and one expand.
    return _figures(time_graph([lambda: [call() for call in calls]]), num_bytes=moved)


def time_states(rows: int, length: int) -> Record:
    """Time the convolution and the recurrence of a layer of Qwen3.5 9B."""
    calls, moved = calls_of_states([length] * rows, 8192, (16, 32, 128, 128))
    return _figures(time_graph([lambda: [call() for call in calls]]), num_bytes=moved)


def time_prompt(form: str, num_tokens: int, rule: str) -> Record:
    """Time the recurrence of a layer over a prompt: Qwen3.5 9B's delta rule, or the Mamba-2 of
    Granite 4 H Tiny."""
    has_beta = rule == "delta"
    heads = (16, 32, 128, 128) if has_beta else (1, 48, 128, 64)
    call, flops, moved = calls_of_prompt(form, num_tokens, heads, has_beta)
    return _figures(time_graph([call]), flops=flops, num_bytes=moved)


def cases() -> list[Case]:  # over 50 lines: it is a list
    """Return the cases: limits, decode, extend, then small kernels, each beside its comparisons."""
    found = [
        Case("limit copy", limit_copy),
        Case("limit read", limit_read),
        Case("limit matmul", limit_matmul),
    ]

    def add(name: str, function: object, *args: object) -> None:
        found.append(Case(name, functools.partial(function, *args)))  # type: ignore[arg-type]

    big, middle = (4096,) * 64, (1600,) * 32
    mixed = mixed_lengths(256, 100, 2048)
    for block_size in (16, 64):
        add(f"decode llama 64x4096 b{block_size}", time_decode, LLAMA_8B, block_size, big)
        add(f"decode llama 32x1600 b{block_size}", time_decode, LLAMA_8B, block_size, middle)
        add(f"decode llama 1x8192 b{block_size}", time_decode, LLAMA_8B, block_size, (8192,))
        add(f"extend llama 8k b{block_size}", time_extend, LLAMA_8B, block_size, 8192, 8192)
    add("extend llama 8k in order b128", functools.partial(time_extend, in_order=True), LLAMA_8B,
        128, 8192, 8192)  # fmt: skip
    add("decode llama fp8 64x4096 b16", functools.partial(time_decode, dtype=E4M3), LLAMA_8B, 16,
        big)  # fmt: skip
    add("decode llama fp8 1x8192 b16", functools.partial(time_decode, dtype=E4M3), LLAMA_8B, 16,
        (8192,))  # fmt: skip
    add("extend llama fp8 8k b16", functools.partial(time_extend, dtype=E4M3), LLAMA_8B, 16, 8192,
        8192)  # fmt: skip
    add("write llama 4096 tokens", time_write, LLAMA_8B, 4096, False)
    for name, cascade, dtype in (
        ("cascade", True, BF16), ("no cascade", False, BF16), ("cascade fp8", True, E4M3),
    ):  # fmt: skip
        add(f"shared {name} 64x4096+128", time_shared, LLAMA_8B, 64, 4096, 128, cascade, dtype)
    for rows in (1, 32, 256):
        for name, params in SAMPLED.items():
            add(f"sample {name} {rows}x151936", time_sampling, 151_936, rows, params)
    add("sample torch top_k+p 256x151936", time_sampling, 151_936, 256, SAMPLED["top_k+p"], False)
    add("sample torch top_p 256x151936", time_sampling, 151_936, 256, SAMPLED["top_p"], False)
    add("shared cascade 8x1024+128", time_shared, LLAMA_8B, 8, 1024, 128, True)
    add("shared no cascade 8x1024+128", time_shared, LLAMA_8B, 8, 1024, 128, False)
    add("sdpa flash decode 64x4096", time_sdpa_decode, LLAMA_8B, 64, 4096)
    add("sdpa flash decode 1x8192", time_sdpa_decode, LLAMA_8B, 1, 8192)
    add("sdpa flash extend 8k", time_sdpa_extend, LLAMA_8B, 8192, SDPBackend.FLASH_ATTENTION)
    add("sdpa cudnn extend 8k", time_sdpa_extend, LLAMA_8B, 8192, SDPBackend.CUDNN_ATTENTION)
    add("decode llama mixed 256 b16", time_decode, LLAMA_8B, 16, mixed)
    add("decode llama 1x1024 b16", time_decode, LLAMA_8B, 16, (1024,))
    add("decode llama 1x32768 b16", time_decode, LLAMA_8B, 16, (32768,))
    add("decode qwen 64x4096 b16", time_decode, QWEN_06B, 16, big)
    add("decode qwen 256x1024 b16", time_decode, QWEN_06B, 16, (1024,) * 256)
    add("decode qwen 1x1024 b16", time_decode, QWEN_06B, 16, (1024,))
    add("decode gemma4 64x4096 b16", time_decode, GEMMA_26B, 16, big)
    add("extend gemma4 8k b16", time_extend, GEMMA_26B, 16, 8192, 8192)
    for heads in (16, 20, 128):
        latents = Shape(f"{heads} heads, latents", heads, 1, 576, 512)
        add(f"decode latents h{heads} 64x4096 b16", time_decode, latents, 16, big)
    add("extend llama 1k b16", time_extend, LLAMA_8B, 16, 1024, 1024)
    add("extend llama 2k after 6k b16", time_extend, LLAMA_8B, 16, 2048, 8192)
    add("extend llama 16x512 b16", time_extend, LLAMA_8B, 16, 512, 512, 16)
    add("extend qwen 8k b16", time_extend, QWEN_06B, 16, 8192, 8192)
    add("schedule 1x8192", time_schedule, 1, 8192)
    add("schedule 256x1024", time_schedule, 256, 1024)
    add("inputs 256x1024", time_inputs, [1023] * 256, [1] * 256, 1 / 16)
    add("inputs 8k beside 255", time_inputs, [1023] * 255 + [0], [1] * 255 + [8192], 1 / 16)
    add("inputs 8x131072", time_inputs, [131_071] * 8, [1] * 8, 1 / 16)
    for num_tokens in (1, 256, 4096, 16384):
        if num_tokens != 4096:
            add(f"write llama {num_tokens} tokens", time_write, LLAMA_8B, num_tokens, False)
        add(f"rope+write llama {num_tokens} tokens", time_write, LLAMA_8B, num_tokens, True)
    for pairs in (1, 16, 128):
        add(f"copy_blocks {pairs} pairs b16", time_copy_blocks, LLAMA_8B, pairs, 16)
    for kind, size in (("rms_norm", 4096), ("fused_add_rms_norm", 4096), ("silu_and_mul", 14336)):
        for num_rows in (1, 256, 8192):
            add(f"{kind} {num_rows}x{size}", time_rows, kind, num_rows, size)
    for rows, slots, rank in ((1, 1, 16), (32, 4, 16), (32, 4, 64), (8192, 4, 16)):
        add(f"lora {rows} rows, {slots} of rank {rank}", time_lora, rows, slots, rank)
    for rows, length in ((1, 1), (64, 1), (256, 1), (1, 8192)):
        add(f"states {rows} rows of {length}", time_states, rows, length)
    for num_tokens, rule, form in product((512, 4096, 32768), ("delta", "mamba"), RECURRENCES):
        add(f"recurrence {form} {rule} {num_tokens}", time_prompt, form, num_tokens, rule)
    for num_rows, kind in product((1, 64, 4096), ("dense", "int4", "float8", "float8 torch")):
        add(f"product {kind} {num_rows}x14336x4096", time_product, kind, num_rows, 14336, 4096)
    for num_tokens, how in product((1, 32, 4096), ("kernel", "torch")):
        add(f"experts {how} {num_tokens} tokens", time_experts, how, num_tokens)
    for block_size in (32, 128):
        add(f"decode llama 64x4096 b{block_size}", time_decode, LLAMA_8B, block_size, big)
        add(f"extend llama 8k b{block_size}", time_extend, LLAMA_8B, block_size, 8192, 8192)
    return found
