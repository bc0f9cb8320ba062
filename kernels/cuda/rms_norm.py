"""RMSNorm (arXiv 1910.07467), alone and fused with the residual addition before it.

    out = x / sqrt(mean(x²) + eps) · weight,    fused: x = residual = residual + input

One program per row: the hidden_size elements stay in registers, so each is read and written once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ..checks import (
    FLOAT_DTYPES,
    once_a_signature,
    require,
    require_contiguous,
    require_dtype,
    require_last_contiguous,
    require_launchable,
    require_shape,
)
from .dependent_launch import begin_program, launch_options

MAX_HIDDEN_SIZE = 65536
"""Longest row that one program holds in registers."""


@triton.jit
def _rms_norm_kernel(
    out_ptr,
    input_ptr,
    residual_ptr,
    weight_ptr,
    input_stride,
    residual_stride,
    out_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    begin_program(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE_PAD)
    mask = column < SIZE
    x = tl.load(input_ptr + row * input_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row * residual_stride + column
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptrs, rounded, mask=mask)
        x = rounded.to(tl.float32)  # normalise what is stored: the next layer adds to that
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if PLUS_ONE:
        weight += 1.0
    x *= tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    tl.store(
        out_ptr + row * out_stride + column, (x * weight).to(out_ptr.dtype.element_ty), mask=mask
    )


@once_a_signature
def _check(
    input: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> None:
    require_shape("input", input, None, None)
    for name, other in (("out", out), ("residual", residual)):
        if other is not None:
            require_shape(name, other, *input.shape)
            require_dtype(name, other, input.dtype)
            require_last_contiguous(name, other)
    size = input.shape[-1]
    require(0 < size <= MAX_HIDDEN_SIZE, f"hidden size must be 1 to {MAX_HIDDEN_SIZE}, not {size}")
    require(eps >= 0, f"eps must not be negative, not {eps}")
    require_dtype("input", input, *FLOAT_DTYPES)
    require_dtype("weight", weight, *FLOAT_DTYPES)
    require_shape("weight", weight, size)
    require_contiguous("weight", weight)
    require_last_contiguous("input", input)
    require_launchable(input=input, residual=residual, weight=weight, out=out)


def _launch(
    out: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    plus_one: bool,
    pdl: bool,
) -> None:
    """Check the arguments of either launcher and launch."""
    _check(input, out, residual, weight, eps)
    size = input.shape[-1]
    if input.numel() == 0:
        return
    size_pad = triton.next_power_of_2(size)
    _rms_norm_kernel[(input.shape[0],)](
        out,
        input,
        residual,
        weight,
        input.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        PLUS_ONE=plus_one,
        SIZE=size,
        SIZE_PAD=size_pad,
        PDL=pdl,
        num_warps=min(16, max(1, size_pad // 256)),
        **launch_options(pdl),
    )


def rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    plus_one: bool = False,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Compute x / sqrt(mean(x²) + eps) · weight for each row of input `[num_rows, size]`.

    `plus_one` multiplies by 1 + weight instead, as Gemma does. The computation is in float32 and
    rounded once; `out` may be `input`. `pdl` launches it as dependent_launch.py says. Raises
    ValueError on shapes, dtypes or devices that do not fit.
    """
    out = torch.empty_like(input) if out is None else out
    _launch(out, input, None, weight, eps, plus_one, pdl)
    return out


def fused_add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    plus_one: bool = False,
    pdl: bool = False,
) -> None:
    """In place: residual += input, rounded to its dtype; then input = rms_norm(residual).

    input and residual are `[num_rows, size]` of one dtype. Raises ValueError on shapes, dtypes or
    devices that do not fit.
    """
    _launch(input, input, residual, weight, eps, plus_one, pdl)
