"""Compare the grouped product with the reference: 1e-5 (float32), 1e-3 (float16).

The interpreter has no bfloat16 matmul.
"""

import pytest
import torch
from paged import relative_error

from quire.kernels import reference
from quire.kernels.cuda import grouped_product as module
from quire.kernels.cuda.grouped_product import can_multiply, grouped_product

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3}


def weight_of(
    kind: str, rows: int, depth: int, group: int, *, minimum: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return random integers or float8 numbers, their scales and minimums."""
    if kind == "4":
        quants = torch.randint(0, 256, (rows, depth // 2)).to(torch.uint8)
    elif kind == "8":
        quants = torch.randint(-128, 128, (rows, depth)).to(torch.int8)
    else:
        quants = torch.randn(rows, depth).mul(20).to(torch.float8_e4m3fn)
    scale = torch.rand(rows, depth // group) + 0.5
    return quants, scale, -7 * torch.rand_like(scale) if minimum else None


@pytest.mark.parametrize(
    "kind,rows,depth,group",
    [
        ("4", 40, 128, 32),
        ("4", 64, 256, 128),
        ("4", 33, 96, 48),
        ("4", 16, 64, 64),
        ("8", 40, 128, 32),
        ("8", 70, 192, 16),
        ("float8", 40, 128, 128),
        ("float8", 16, 256, 128),
    ],
)
@pytest.mark.parametrize("num_rows", [1, 19, 70])
def test_products(kind: str, rows: int, depth: int, group: int, num_rows: int) -> None:
    weight = weight_of(kind, rows, depth, group, minimum=kind != "float8")
    x = torch.randn(num_rows, depth)
    found = grouped_product(x, *weight)
    expected = reference.grouped_product(x.double(), *weight)
    assert found.shape == (num_rows, rows)
    assert relative_error(found, expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("parts", [1, 3])
def test_types_biases_and_parts_of_the_depth(
    dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strided rows; the last of the parts is shorter."""
    monkeypatch.setattr(module, "product_parts", lambda *_: parts)
    weight = weight_of("4", 48, 1024, 128)
    x, bias = torch.randn(5, 2048)[:, :1024].to(dtype), (100 * torch.randn(48)).to(dtype)
    found = grouped_product(x, *weight, bias=bias)
    expected = reference.grouped_product(x.double(), *weight, bias=bias.double())
    assert found.dtype == dtype
    assert relative_error(found, expected) < TOLERANCES[dtype]


def test_which_groups_fit() -> None:
    assert can_multiply(4096, 128) and can_multiply(4096, 32) and can_multiply(4096, 4096)
    assert can_multiply(96, 48) and can_multiply(2560, 16)
    assert not can_multiply(96, 24) and not can_multiply(100, 50) and not can_multiply(24, 8)


@pytest.mark.parametrize(
    "name,change",
    [
        ("input", lambda x: x[:, :-2]),
        ("input", lambda x: x.double()),
        ("input", lambda x: x.T.contiguous().T),
        ("quants", lambda x: x.to(torch.int32)),
        ("quants", lambda x: x[:, :-1]),
        ("scale", lambda x: x.half()),
        ("scale", lambda x: x[:-1]),
        ("scale", lambda x: x[:, :3].contiguous()),
        ("minimum", lambda x: x[:, :1]),
        ("bias", lambda x: x[:-1]),
        ("bias", lambda x: x.to("meta")),
    ],
)
def test_refusals(name: str, change: object) -> None:
    quants, scale, minimum = weight_of("4", 16, 128, 32)
    have = {"input": torch.randn(2, 128), "quants": quants, "scale": scale, "minimum": minimum}
    have["bias"] = torch.zeros(16)
    grouped_product(**have)
    with pytest.raises(ValueError):
        grouped_product(**have | {name: change(have[name])})


def test_no_rows() -> None:
    assert grouped_product(torch.randn(0, 128), *weight_of("8", 16, 128, 32)).shape == (0, 16)
