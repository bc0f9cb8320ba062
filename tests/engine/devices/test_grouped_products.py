"""Test which products the CUDA backend chooses for grouped layers, and what they compute."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine.body.grouped_linear import GroupedWeight
from quire.engine.devices.cuda.layers import products
from quire.engine.devices.cuda.layers.products import multiplies_float8, multiply_float8
from quire.kernels import reference

from ..checkpoints.quantized_files import FORMATS, write_model
from ..models import generate
from ..worker_driver import Driver, make_config, make_sequence
from .cuda_on_cpu import REFERENCES, CudaOnCpuBackend

PROMPT = [5, 80, 17, 33, 64, 9, 110, 7]


def float8_weight(rows: int = 48, columns: int = 64) -> GroupedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    return GroupedWeight((weight / scale).to(torch.float8_e4m3fn), scale, None, 8, columns)


class CountedProduct:
    """The reference of the kernel, which counts its calls by type of weight."""

    def __init__(self) -> None:
        self.calls: list[torch.dtype] = []

    def __call__(self, input: torch.Tensor, quants: torch.Tensor, *args: Any, **kw: Any) -> Any:
        self.calls.append(quants.dtype)
        return reference.grouped_product(input, quants, *args, **kw)


@pytest.mark.parametrize(
    ("family", "form", "dtype"),
    [
        ("llama", "awq", torch.uint8),
        ("qwen3", "gptq-8-asymmetric", torch.int8),
        ("qwen3_moe", "packed-4", torch.uint8),
        ("llama", "float8-blocks", torch.float8_e4m3fn),
    ],
)
def test_grouped_layers_multiply_as_they_are(
    tmp_path: Path, family: str, form: str, dtype: torch.dtype
) -> None:
    expected = write_model(tmp_path, family, FORMATS[form])
    product = CountedProduct()
    backend = CudaOnCpuBackend(REFERENCES._replace(grouped_product=product))
    driver = Driver.start(make_config(tmp_path / "quantised", dtype="float32"), backend)
    product.calls.clear()
    [tokens] = driver.run([make_sequence(PROMPT, 8)])
    assert tokens == generate(expected, PROMPT, 8)
    assert set(product.calls) == {dtype}


def test_groups_that_fit_no_product_are_made_dense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "can_multiply", lambda depth, size: depth != 32)
    expected = write_model(tmp_path, "llama", FORMATS["packed-4"])
    product = CountedProduct()
    backend = CudaOnCpuBackend(REFERENCES._replace(grouped_product=product))
    with caplog.at_level(logging.INFO):
        driver = Driver.start(make_config(tmp_path / "quantised", dtype="float32"), backend)
        [tokens] = driver.run([make_sequence(PROMPT, 8)])
    assert tokens == generate(expected, PROMPT, 8)
    assert product.calls  # of rows of 64 columns
    assert (
        "linear layers multiply 4-bit groups, made dense: groups of 16 fit no product"
        in caplog.text
    )


def test_torch_multiplies_float8_with_a_scale_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = float8_weight()
    assert multiplies_float8(weight, torch.bfloat16)
    assert not multiplies_float8(weight, torch.float16)
    assert not multiplies_float8(float8_weight(40), torch.bfloat16)
    by_blocks = weight._replace(scale=weight.scale.expand(-1, 2), group_size=32)
    assert not multiplies_float8(by_blocks, torch.bfloat16)
    monkeypatch.setattr(products, "compute_capability", lambda device: 80)
    assert not multiplies_float8(weight, torch.bfloat16)


def test_each_token_has_its_own_scale_in_float8() -> None:
    """The result is that of inputs rounded by token, and no token changes another's."""
    weight, bias = float8_weight(), torch.arange(48.0)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[0, 0] *= 1000
    x[1, 2] = 0
    found = multiply_float8(REFERENCES, x, weight, bias)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 3, 48)
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 448
    rounded = (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
    expected = rounded @ weight.dense().T + bias
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(multiply_float8(REFERENCES, x[1:], weight, bias), found[1:])


def test_a_float8_checkpoint_in_bfloat16_multiplies_by_torch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, "llama", FORMATS["float8-row"])
    product = CountedProduct()
    backend = CudaOnCpuBackend(REFERENCES._replace(grouped_product=product))
    with caplog.at_level(logging.INFO):
        config = make_config(tmp_path / "quantised", dtype="bfloat16")
        driver = Driver.start(config, backend)
        [tokens] = driver.run([make_sequence(PROMPT, 4)])
    assert len(tokens) == 4 and not product.calls
    assert "float8 by torch's scaled product" in caplog.text


def test_a_weight_moves_with_all_its_parts() -> None:
    weight = float8_weight()
    for one in (weight, weight._replace(minimum=-weight.scale)):
        moved = one.to(torch.device("meta"))
        parts = [part for part in moved[:3] if part is not None]
        assert len(parts) == (2 if one.minimum is None else 3)
        assert all(part.device.type == "meta" for part in parts)
        assert moved.scale.dtype == torch.float32 and moved.shape == weight.shape
