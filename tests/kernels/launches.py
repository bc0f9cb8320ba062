"""The launches whose machine code is tested, and the table of them in docs/kernels.md.

Run this file to print the table.
"""

import functools
import re
from collections.abc import Callable

import torch
from compiling import Compiled, compile_launch
from packed import packed_step
from paged import PagedInputs, paged_inputs
from state_steps import convolution, recurrence, state_step

from quire.kernels.cuda.attention.cascade import CascadeWorkspace
from quire.kernels.cuda.attention.decode_schedule import DecodeWorkspace, build_decode_schedule
from quire.kernels.cuda.attention.paged_attention_decode import paged_attention_decode
from quire.kernels.cuda.attention.paged_attention_extend import paged_attention_extend
from quire.kernels.cuda.copy_blocks import copy_blocks
from quire.kernels.cuda.fp8 import quantize_rows
from quire.kernels.cuda.grouped_product import grouped_product
from quire.kernels.cuda.lora import lora_expand, lora_shrink, rank_pad
from quire.kernels.cuda.prepare_inputs import prepare_inputs
from quire.kernels.cuda.reshape_and_cache import reshape_and_cache
from quire.kernels.cuda.rms_norm import fused_add_rms_norm, rms_norm
from quire.kernels.cuda.rope_and_cache import rope_and_cache
from quire.kernels.cuda.run_experts import Clamp, run_experts
from quire.kernels.cuda.sampling.best_tokens import best_tokens
from quire.kernels.cuda.sampling.sample_tokens import sample_tokens
from quire.kernels.cuda.silu_and_mul import silu_and_mul
from quire.kernels.cuda.states.causal_conv import causal_conv
from quire.kernels.cuda.states.chunked_recurrence import chunked_recurrence
from quire.kernels.cuda.states.gated_recurrence import gated_recurrence

SHARED_LIMITS = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that one program may have, by compute capability."""
COPY_SIZE = re.compile(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (0x[0-9a-f]+)")
LOAD = re.compile(r"ld\.global(?:\.\w+::\w+|\.\w+::\w+::\w+|\.cg)*(?:\.v(\d))?\.b(\d+)")
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
Heads = tuple[int, int, int]


def _inputs(
    query_lens: list[int],
    seq_lens: list[int],
    heads: Heads,
    block_size: int,
    cache: torch.dtype,
    value_width: int | None,
) -> tuple[PagedInputs, tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
    """Return bf16 queries, caches of dtype `cache`, and scales for float8. Latents have no V."""
    inputs = paged_inputs(
        query_lens, seq_lens, num_heads=heads[0], num_kv_heads=heads[1], head_dim=heads[2],
        block_size=block_size, dtype=BF16,
    )  # fmt: skip
    scales = torch.ones(2, heads[1]) if cache == E4M3 else None
    if value_width is not None:
        return inputs, (inputs.key_cache.to(cache), None), scales
    return inputs, (inputs.key_cache.to(cache), inputs.value_cache.to(cache)), scales


def extend(
    heads: Heads,
    block_size: int,
    cache: torch.dtype = BF16,
    *,
    window: int | None = None,
    value_width: int | None = None,
) -> None:
    inputs, caches, scales = _inputs([200], [400], heads, block_size, cache, value_width)
    paged_attention_extend(
        inputs.query, *caches, inputs.block_table, inputs.query_start_loc, inputs.seq_lens,
        scale=inputs.scale, max_query_len=200, kv_scales=scales, window=window,
        value_width=value_width,
    )  # fmt: skip


def decode(
    heads: Heads,
    block_size: int,
    cache: torch.dtype = BF16,
    *,
    cascade: bool = False,
    pdl: bool = False,
    window: int | None = None,
    value_width: int | None = None,
) -> None:
    inputs, caches, scales = _inputs([1, 1], [400, 20], heads, block_size, cache, value_width)
    workspace = DecodeWorkspace.allocate(
        64, *heads, dtype=BF16, device="cpu", window=window, value_width=value_width
    )
    groups = None
    if cascade:
        groups = CascadeWorkspace.allocate(workspace, dtype=BF16, cache_dtype=cache)
    if not pdl:  # this one is launched as usual
        build_decode_schedule(
            inputs.seq_lens, workspace, prefix_lens=None if groups is None else groups.prefix_lens
        )
    paged_attention_decode(
        inputs.query, *caches, inputs.block_table, inputs.seq_lens, scale=inputs.scale,
        workspace=workspace, kv_scales=scales, cascade=groups, pdl=pdl, window=window,
        value_width=value_width,
    )  # fmt: skip


def write(rope: bool, cache: torch.dtype = BF16, *, pdl: bool = False) -> None:
    packed = torch.zeros(3, 48, 128, dtype=BF16)
    query, key, value = packed.split([32, 8, 8], dim=1)
    caches = torch.zeros(2, 4, 8, 16, 128, dtype=cache)
    slots = torch.zeros(3, dtype=torch.int64)
    if rope:
        cos, weight = torch.zeros(3, 128, dtype=BF16), torch.zeros(128, dtype=BF16)
        rope_and_cache(
            query, key, value, *caches, slots, cos, cos, query_weight=weight, key_weight=weight,
            pdl=pdl,
        )  # fmt: skip
    else:
        reshape_and_cache(key, value, *caches, slots)


def write_latents() -> None:
    latents, cache = torch.zeros(3, 1, 576, dtype=BF16), torch.zeros(4, 1, 16, 576, dtype=BF16)
    slots = torch.zeros(3, dtype=torch.int64)
    reshape_and_cache(latents, None, cache, None, slots, value_width=512)


def copy() -> None:
    ids = torch.zeros(3, dtype=torch.int64)
    copy_blocks(torch.zeros(2, 2, 4, 8, 16, 128, dtype=BF16), ids, ids)


def rows(kind: str) -> None:
    x = torch.zeros(4, 4096, dtype=BF16)
    if kind == "norm":
        fused_add_rms_norm(x, x.clone(), torch.zeros(4096, dtype=BF16), eps=1e-6)
    else:
        silu_and_mul(x)


def product(num_rows: int, kind: str, group: int) -> None:
    """Multiply by a weight of 4096 columns of 4 bits, or of float8."""
    x, scale = torch.zeros(num_rows, 4096, dtype=BF16), torch.zeros(4096, 4096 // group)
    if kind == "4 bits":
        quants = torch.zeros(4096, 2048, dtype=torch.uint8)
        grouped_product(x, quants, scale, scale)
    else:
        grouped_product(x, torch.zeros(4096, 4096, dtype=E4M3), scale, None)


def experts(rows: int, hidden: int, size: int, clamp: Clamp | None = None) -> None:
    """Run a mixture of experts that have so many rows each. A clamped gate has biases too."""
    number, top_k = 4, 2

    def zeros(*dims: int) -> torch.Tensor:
        return torch.zeros(dims, dtype=BF16)

    biases = {}
    if clamp is not None:
        biases = {"gate_up_bias": zeros(number, 2 * size), "down_bias": zeros(number, hidden)}
    chosen = torch.zeros(rows * number // top_k, top_k, dtype=torch.int64)
    x, weights = zeros(len(chosen), hidden), zeros(*chosen.shape)
    gate_up, down = zeros(number, 2 * size, hidden), zeros(number, hidden, size)
    run_experts(x, chosen, weights, gate_up, down, clamp=clamp, **biases)


def sample(filtered: bool) -> None:
    """Sample from Qwen3's vocabulary with every filter or none."""
    ids, column = torch.ones(4, dtype=torch.int64), torch.ones(4, 1)
    logits = torch.zeros(4, 151_936, dtype=BF16)
    filters = {"top_k": ids, "top_p": column.double(), "log_min_p": column} if filtered else {}
    sample_tokens(
        logits, logits[:, 0].contiguous(), rows=ids, seeds=ids, positions=ids, temperature=column,
        **filters,
    )  # fmt: skip


def adapters(max_rank: int) -> None:
    """Add what adapters add to the merged Q, K and V of Llama 3.1 8B."""
    sizes, slots = (4096, 1024, 1024), 4
    x, out = torch.zeros(32, 4096, dtype=BF16), torch.zeros(32, sum(sizes), dtype=BF16)
    a = torch.zeros(slots, 3, max_rank, 4096, dtype=BF16)
    b = torch.zeros(slots, sum(sizes), max_rank, dtype=BF16)
    loc, ranks = (torch.zeros(*shape, dtype=torch.int32) for shape in ((slots + 1,), (slots, 3)))
    rows = (torch.zeros(32, dtype=torch.int32), loc, ranks)
    h = torch.zeros(3, 32, rank_pad(max_rank))
    lora_shrink(x, a, *rows, h)
    lora_expand(h, b, *rows, sizes, out)


def convolve() -> None:
    """Convolve the channels of Qwen3.5's linear attention."""
    step = state_step([200, 1], [0, 40])
    causal_conv(*convolution(step, 8192, 4, BF16, has_bias=False), *step)


def recur(heads: tuple[int, int, int, int], *, has_beta: bool) -> None:
    step = state_step([3, 1], [0, 40])
    gated_recurrence(
        *recurrence(step, heads, BF16, has_beta=has_beta), *step, scale=0.1, normalise=has_beta
    )


def recur_in_chunks(heads: tuple[int, int, int, int], *, has_beta: bool) -> None:
    """Values of Mamba-2 are products with time steps, which are float32."""
    step = state_step([200, 1], [0, 40])
    have = recurrence(step, heads, BF16, has_beta=has_beta)
    if not has_beta:
        have = have._replace(value=have.value.float())
    chunked_recurrence(*have, *step, scale=0.1, normalise=has_beta)


def best() -> None:
    """Look for the likeliest tokens of Qwen3's vocabulary."""
    logits, ids = torch.zeros(4, 151_936, dtype=BF16), torch.zeros(4, dtype=torch.int64)
    best_tokens(logits, logits[:, 0].contiguous(), ids, ids.bool())


def quantize() -> None:
    rows = torch.zeros(4, 4096, dtype=BF16)
    quantize_rows(rows, rows.to(E4M3), torch.zeros(4, 1))


def prepare() -> None:
    packed_step([4000, 0], [1, 300]).run(prepare_inputs)


LAUNCHES: dict[str, Callable[[], None]] = {
    "extend 32/8 heads, dim 128, block 16": lambda: extend((32, 8, 128), 16),
    "extend 32/8 heads, dim 128, block 64": lambda: extend((32, 8, 128), 64),
    "extend 14/2 heads, dim 64, block 16": lambda: extend((14, 2, 64), 16),
    "decode 32/8 heads, dim 128, block 16": lambda: decode((32, 8, 128), 16),
    "decode 32/8 heads, dim 128, block 64": lambda: decode((32, 8, 128), 64),
    "decode 14/2 heads, dim 64, block 16": lambda: decode((14, 2, 64), 16),
    "decode 16/8 heads, dim 128, block 16": lambda: decode((16, 8, 128), 16),
    "extend 32/8 heads, dim 128, block 16, fp8": lambda: extend((32, 8, 128), 16, E4M3),
    "extend 14/2 heads, dim 64, block 16, fp8": lambda: extend((14, 2, 64), 16, E4M3),
    "decode 32/8 heads, dim 128, block 16, fp8": lambda: decode((32, 8, 128), 16, E4M3),
    "decode 32/8 heads, dim 128, block 64, fp8": lambda: decode((32, 8, 128), 64, E4M3),
    "decode 14/2 heads, dim 64, block 16, fp8": lambda: decode((14, 2, 64), 16, E4M3),
    "cascade 32/8 heads, dim 128, block 16": lambda: decode((32, 8, 128), 16, cascade=True),
    "cascade 32/8 heads, dim 128, block 16, fp8": lambda: decode(
        (32, 8, 128), 16, E4M3, cascade=True
    ),
    "extend 16/2 heads, dim 512, block 16": lambda: extend((16, 2, 512), 16),
    "decode 16/2 heads, dim 512, block 16": lambda: decode((16, 2, 512), 16),
    "cascade 16/2 heads, dim 512, block 16": lambda: decode((16, 2, 512), 16, cascade=True),
    "extend 16 heads, latents 512 + 64": lambda: extend((16, 1, 576), 16, value_width=512),
    "decode 16 heads, latents 512 + 64": lambda: decode((16, 1, 576), 16, value_width=512),
    "decode 20 heads, latents 512 + 64": lambda: decode((20, 1, 576), 16, value_width=512),
    "decode 128 heads, latents 512 + 64": lambda: decode((128, 1, 576), 16, value_width=512),
    "write latents 512 + 64": write_latents,
    "write K and V": lambda: write(False),
    "write K and V, fp8": lambda: write(False, E4M3),
    "norm, rope and write": lambda: write(True),
    "norm, rope and write, fp8": lambda: write(True, E4M3),
    "copy blocks": copy,
    "prepare inputs": prepare,
    "fused add and RMSNorm, 4096": lambda: rows("norm"),
    "silu and mul, 2048": lambda: rows("silu"),
    "causal convolution, 8192": convolve,
    "delta rule, 16/32 heads, 128 × 128": lambda: recur((16, 32, 128, 128), has_beta=True),
    "Mamba-2, 1/48 heads, 128 × 64": lambda: recur((1, 48, 128, 64), has_beta=False),
    "delta rule in chunks, 16/32 heads, 128 × 128": lambda: recur_in_chunks(
        (16, 32, 128, 128), has_beta=True
    ),
    "Mamba-2 in chunks, 1/48 heads, 128 × 64": lambda: recur_in_chunks(
        (1, 48, 128, 64), has_beta=False
    ),
    "Mamba-2 in chunks, 1/24 heads, 256 × 64": lambda: recur_in_chunks(
        (1, 24, 256, 64), has_beta=False
    ),
    "LoRA shrink and expand, rank 16": lambda: adapters(16),
    "LoRA shrink and expand, rank 64": lambda: adapters(64),
    "product of 1 row, 4 bits in 32s": lambda: product(1, "4 bits", 32),
    "product of 1 row, 4 bits in 128s": lambda: product(1, "4 bits", 128),
    "product of 64 rows, 4 bits in 128s": lambda: product(64, "4 bits", 128),
    "product of 512 rows, 4 bits in 128s": lambda: product(512, "4 bits", 128),
    "product of 1 row, float8 in 128s": lambda: product(1, "float8", 128),
    "product of 512 rows, float8 in 128s": lambda: product(512, "float8", 128),
    "float8 rows, 4096": quantize,
    "best tokens, 151936": best,
    "experts of 4 rows each, 2048 x 768": lambda: experts(4, 2048, 768),
    "experts of 32 rows each, 2048 x 768": lambda: experts(32, 2048, 768),
    "experts of 256 rows each, 2048 x 768": lambda: experts(256, 2048, 768),
    "experts of 4 rows each, clamped, 2880 x 2880": lambda: experts(4, 2880, 2880, (7.0, 1.702)),
    "experts of 256 rows each, clamped, 2880 x 2880": lambda: experts(
        256, 2880, 2880, (7.0, 1.702)
    ),
    "sample tokens, 151936": lambda: sample(True),
    "sample tokens unfiltered, 151936": lambda: sample(False),
}


def _dependent(kind: str) -> None:
    """Launch a kernel of a layer before the one that it follows has ended."""
    x, weight = torch.zeros(4, 4096, dtype=BF16), torch.zeros(4096, dtype=BF16)
    if kind == "norm":
        rms_norm(x, weight, eps=1e-6, pdl=True)
    elif kind == "fused add and norm":
        fused_add_rms_norm(x, x.clone(), weight, eps=1e-6, pdl=True)
    else:
        silu_and_mul(x, pdl=True)


DEPENDENT: dict[str, Callable[[], None]] = {
    "norm": lambda: _dependent("norm"),
    "fused add and norm": lambda: _dependent("fused add and norm"),
    "silu and mul": lambda: _dependent("silu and mul"),
    "norm, rope and write": lambda: write(True, pdl=True),
    "decode": lambda: decode((32, 8, 128), 16, pdl=True),
    "decode, fp8": lambda: decode((32, 8, 128), 16, E4M3, pdl=True),
}
"""Launches before the kernel that they follow has ended."""


CHUNKED: dict[str, Callable[[], None]] = {
    "extend": lambda: extend((40, 8, 128), 16, window=-8192),
    "decode": lambda: decode((40, 8, 128), 16, window=-8192),
}
"""Launches of layers that attend in chunks, with Llama 4's heads."""


@functools.cache
def compiled(name: str, arch: int) -> list[Compiled]:
    """Compile a launch for sm_<arch>; one entry per kernel, in the order of the launches."""
    return compile_launch(LAUNCHES[name], arch)


def dots(ptx: str) -> str:
    """Return the instruction of a kernel's matrix products, or an empty string."""
    names = ("wgmma.mma_async", "mma.sync")
    return next((name.partition(".m")[0] for name in names if name in ptx), "")


def widest_load(ptx: str) -> int:
    """Return the maximum number of bytes that a thread reads from global memory at a time."""
    copies = [int(size, 0) for size in COPY_SIZE.findall(ptx)]
    loads = [
        int(count or 1) * int(bits) // 8 for count, bits in LOAD.findall(ptx)
    ]  # fmt: skip
    return max(copies + loads)


def table() -> str:
    """Return the resources of every launch's main kernel as a Markdown table."""
    lines = [
        "| launch (bf16) | GPU | registers | spills (B) | shared memory (B) | dots | loads (B) |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for arch in SHARED_LIMITS:
        for name in LAUNCHES:
            # The cascade's own kernel and those over pieces run before the kernel that merges, the
            # products of experts before the sum.
            first = ("unfiltered" in name, name.startswith(("cascade", "best tokens")))
            last = -2 if any(first) else -1
            last = -3 if name.startswith("experts") else last
            _, registers, spills, shared, ptx, _ = compiled(name, arch)[last]
            lines.append(
                f"| {name} | `sm_{arch}` | {registers} | {spills} | {shared} | {dots(ptx)} "
                f"| {widest_load(ptx)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
