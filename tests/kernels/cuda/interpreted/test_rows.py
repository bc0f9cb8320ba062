"""Compare norms and activation with the reference: 1e-6 (float32), 1e-3 (float16), 1e-2 (bf16)."""

import pytest
import torch
from paged import relative_error

from quire.kernels import reference
from quire.kernels.cuda.rms_norm import fused_add_rms_norm, rms_norm
from quire.kernels.cuda.silu_and_mul import silu_and_mul

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (3, 2049)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_norms(dtype: torch.dtype, shape: tuple[int, int], plus_one: bool) -> None:
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[1]).to(dtype)
    found = rms_norm(x, weight, eps=1e-6, plus_one=plus_one)
    wide = reference.rms_norm(x.double(), weight.double(), eps=1e-6, plus_one=plus_one)
    assert relative_error(found, wide) < TOLERANCES[dtype]
    have, want = [x.clone(), residual.clone()], [x.clone(), residual.clone()]
    fused_add_rms_norm(*have, weight, eps=1e-5, plus_one=plus_one)
    reference.fused_add_rms_norm(*want, weight, eps=1e-5, plus_one=plus_one)
    for a, b in zip(have, want, strict=True):
        assert relative_error(a, b) < TOLERANCES[dtype]


def test_rms_norm_of_strided_rows_in_place() -> None:
    x = torch.randn(4, 200)[:, :100]
    expected = reference.rms_norm(x, torch.ones(100), eps=1e-6)
    assert rms_norm(x, torch.ones(100), eps=1e-6, out=x) is x
    assert relative_error(x, expected) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 200), (2, 2600)])
def test_silu_and_mul(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = torch.randn(shape).to(dtype) * 4
    assert relative_error(silu_and_mul(x), reference.silu_and_mul(x.double())) < TOLERANCES[dtype]
