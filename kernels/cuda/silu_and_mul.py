"""The activation of a gated MLP (SwiGLU, arXiv 2002.05202) over the merged projection's output.

    out = silu(gate) · up,    silu(x) = x · sigmoid(x)

The grid is (row, BLOCK columns); a program reads gate and up of the same columns.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from ..checks import (
    FLOAT_DTYPES,
    once_a_signature,
    require,
    require_dtype,
    require_last_contiguous,
    require_launchable,
    require_shape,
)
from .dependent_launch import begin_program, launch_options

BLOCK = 1024
"""Columns per program."""


@triton.jit
def _silu_and_mul_kernel(
    out_ptr,
    input_ptr,
    input_stride,
    out_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin_program(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate_ptrs = input_ptr + row * input_stride + column
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + SIZE, mask=mask, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * out_stride + column, result.to(out_ptr.dtype.element_ty), mask=mask)


@once_a_signature
def _check(input: torch.Tensor, out: torch.Tensor | None) -> None:
    require_shape("input", input, None, None)
    require_dtype("input", input, *FLOAT_DTYPES)
    require_last_contiguous("input", input)
    num_rows, double = input.shape
    require(double > 0 and double % 2 == 0, f"input needs an even last dimension, not {double}")
    if out is not None:
        require_shape("out", out, num_rows, double // 2)
        require_dtype("out", out, input.dtype)
        require_last_contiguous("out", out)
    require_launchable(input=input, out=out)


def silu_and_mul(
    input: torch.Tensor, *, out: torch.Tensor | None = None, pdl: bool = False
) -> torch.Tensor:
    """Return silu(gate) · up `[num_rows, size]` of input `[num_rows, 2 * size]`, gate first.

    The computation is in float32 and rounded once. `pdl` launches it as dependent_launch.py says.
    Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    _check(input, out)
    num_rows, double = input.shape
    size = double // 2
    out = input.new_empty(num_rows, size) if out is None else out
    if num_rows == 0:
        return out
    _silu_and_mul_kernel[(num_rows, triton.cdiv(size, BLOCK))](
        out, input, input.stride(0), out.stride(0), SIZE=size, BLOCK=BLOCK, PDL=pdl, num_warps=4,
        **launch_options(pdl),
    )  # fmt: skip
    return out
