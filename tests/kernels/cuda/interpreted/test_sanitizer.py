"""Test that the sanitizer of memory accesses finds what it is for."""

# mypy: allow-untyped-defs

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy_kernel(out_ptr, input_ptr, size, shift, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(input_ptr + index + shift, mask=index < size)
    tl.store(out_ptr + index, value, mask=index < size)


@triton.jit
def _count_kernel(counts_ptr, index):
    tl.atomic_add(counts_ptr + index, 1)


def test_accesses_within_the_tensors_pass() -> None:
    x = torch.arange(64.0)
    out = torch.zeros(5)
    _copy_kernel[(1,)](out, x[3:19:2], 5, 0, BLOCK=8)
    assert out.tolist() == [3, 4, 5, 6, 7]
    counts = torch.zeros(4, dtype=torch.int32)
    _count_kernel[(3,)](counts, 3)
    assert counts.tolist() == [0, 0, 0, 3]


@pytest.mark.parametrize(("size", "shift", "verb"), [(6, 0, "writes 1 of 6"), (5, 12, "reads 1")])
def test_a_step_outside_of_a_tensor_is_found(size: int, shift: int, verb: str) -> None:
    x, out = torch.arange(64.0), torch.zeros(64)
    with pytest.raises(InterpreterError, match=f"OutOfBounds.*_copy_kernel {verb}"):
        _copy_kernel[(1,)](out[:5], x[:16], size, shift, BLOCK=8)


def test_updates_before_and_after_a_tensor_are_found() -> None:
    counts = torch.zeros(6, dtype=torch.int32)[1:5]
    for index in (-1, 4):
        with pytest.raises(InterpreterError, match="OutOfBounds.* updates 1 of 1"):
            _count_kernel[(1,)](counts, index)
