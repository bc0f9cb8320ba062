"""The kernels that the CUDA backend launches, as one value.

The tests put plain references in their place. Importing this loads Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from .....kernels.cuda import (
    copy_blocks,
    fp8,
    grouped_product,
    lora,
    prepare_inputs,
    reshape_and_cache,
    rms_norm,
    rope_and_cache,
    run_experts,
    silu_and_mul,
)
from .....kernels.cuda.attention import (
    decode_schedule,
    paged_attention_decode,
    paged_attention_extend,
)
from .....kernels.cuda.sampling import best_tokens
from .....kernels.cuda.states import causal_conv, chunked_recurrence, gated_recurrence


class Kernels(NamedTuple):
    """Launchers, by the names that they have in `kernels` and in `kernels.reference`."""

    reshape_and_cache: Callable[..., None]
    paged_attention_decode: Callable[..., torch.Tensor]
    paged_attention_extend: Callable[..., torch.Tensor]
    build_decode_schedule: Callable[..., None]
    rope_and_cache: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    fused_add_rms_norm: Callable[..., None]
    silu_and_mul: Callable[..., torch.Tensor]
    grouped_product: Callable[..., torch.Tensor]
    run_experts: Callable[..., torch.Tensor]
    prepare_inputs: Callable[..., Any]
    copy_blocks: Callable[..., None]
    lora_shrink: Callable[..., None]
    lora_expand: Callable[..., None]
    causal_conv: Callable[..., torch.Tensor]
    gated_recurrence: Callable[..., torch.Tensor]
    chunked_recurrence: Callable[..., torch.Tensor]
    best_tokens: Callable[..., None]
    quantize_rows: Callable[..., None]


TRITON = Kernels(
    reshape_and_cache=reshape_and_cache.reshape_and_cache,
    paged_attention_decode=paged_attention_decode.paged_attention_decode,
    paged_attention_extend=paged_attention_extend.paged_attention_extend,
    build_decode_schedule=decode_schedule.build_decode_schedule,
    rope_and_cache=rope_and_cache.rope_and_cache,
    rms_norm=rms_norm.rms_norm,
    fused_add_rms_norm=rms_norm.fused_add_rms_norm,
    silu_and_mul=silu_and_mul.silu_and_mul,
    grouped_product=grouped_product.grouped_product,
    run_experts=run_experts.run_experts,
    prepare_inputs=prepare_inputs.prepare_inputs,
    copy_blocks=copy_blocks.copy_blocks,
    lora_shrink=lora.lora_shrink,
    lora_expand=lora.lora_expand,
    causal_conv=causal_conv.causal_conv,
    gated_recurrence=gated_recurrence.gated_recurrence,
    chunked_recurrence=chunked_recurrence.chunked_recurrence,
    best_tokens=best_tokens.best_tokens,
    quantize_rows=fp8.quantize_rows,
)
"""The kernels of a GPU."""

TRITON_PDL = TRITON._replace(
    paged_attention_decode=partial(paged_attention_decode.paged_attention_decode, pdl=True),
    rope_and_cache=partial(rope_and_cache.rope_and_cache, pdl=True),
    rms_norm=partial(rms_norm.rms_norm, pdl=True),
    fused_add_rms_norm=partial(rms_norm.fused_add_rms_norm, pdl=True),
    silu_and_mul=partial(silu_and_mul.silu_and_mul, pdl=True),
)
"""The same, with the small kernels of a layer launched before the ones that they follow end."""
