"""Run small versions of the checks of benchmarks/gpu.py on the CPU, to test the checks."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[4] / "benchmarks"))
import gpu_attention_checks  # noqa: E402
import gpu_blocks  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_lora  # noqa: E402
import gpu_products  # noqa: E402
import gpu_step_checks  # noqa: E402

from quire.kernels.prefix_groups import PrefixGroup  # noqa: E402

F16, HEADS = torch.float16, (4, 2, 32)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_again(launch: Callable[[], None]) -> Callable[[], None]:
        return launch

    checks = (gpu_checks, gpu_attention_checks, gpu_lora, gpu_products, gpu_step_checks, gpu_blocks)
    for module in checks:
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for module in (gpu_attention_checks, gpu_step_checks):
        monkeypatch.setattr(module, "capture", run_again)


@pytest.mark.parametrize("fp8", [False, True])
def test_attention(fp8: bool) -> None:
    groups, members = [PrefixGroup((0, 2), 128)], [140, 5, 150]
    for record in (
        gpu_checks.check_extend(F16, HEADS, 16, [19, 1], [19, 40], fp8=fp8),
        gpu_checks.check_decode(F16, HEADS, 16, [70, 0, 1], fp8=fp8),
        gpu_checks.check_cascade(F16, HEADS, groups, members, fp8=fp8),
    ):
        assert record["ok"], record


def test_attention_over_latents() -> None:
    heads, groups = (4, 1, 48), [PrefixGroup((0, 2), 128)]
    for record in (
        gpu_checks.check_extend(F16, heads, 16, [19, 1], [19, 40], value_width=32),
        gpu_checks.check_decode(F16, heads, 16, [70, 0, 1], value_width=32),
        gpu_checks.check_cascade(F16, heads, groups, [140, 5, 150], value_width=32),
    ):
        assert record["ok"], record


def test_inputs() -> None:
    assert gpu_checks.check_inputs([70, 3, 0], [1, 1, 40])["ok"]
    assert gpu_checks.check_inputs([70, 3], [1, 1], padding=2)["ok"]


@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
def test_products(kind: str) -> None:
    assert gpu_products.check_product(F16, kind, 3, 48, 128, 32)["ok"]
    assert gpu_products.check_float8(3, 48, 128)["ok"]


def test_sampling() -> None:
    assert gpu_checks.check_sampling(torch.float32, 600, 11)["ok"]


def test_blocks_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in gpu_blocks.SMALL.items():
        monkeypatch.setattr(gpu_blocks, name, value)
    assert gpu_blocks.check_host_blocks(F16, 2, 32)["ok"]


def test_lora() -> None:
    assert gpu_checks.check_lora(torch.float32, 19, 3, 20, 100, (70, 7))["ok"]


def test_captured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    mixes = [([40, 1, 17], [(20, 33)]), ([], [(5, 5), (2, 30)])]
    monkeypatch.setattr(gpu_step_checks, "MIXES", mixes)
    assert gpu_step_checks.check_mixed(F16, HEADS, 16, size=48)["ok"]
    assert gpu_step_checks.check_best_tokens(F16, 3, 5000)["ok"]
    assert gpu_step_checks.check_quantize_rows(torch.float32, 3, 100)["ok"]


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_attention_checks.paged_attention_extend

    def wrong(*arguments: torch.Tensor, out: torch.Tensor, **options: object) -> None:
        right(*arguments, **options, out=out)  # type: ignore[arg-type]
        out[3] *= 1.1

    monkeypatch.setattr(gpu_attention_checks, "paged_attention_extend", wrong)
    assert not gpu_checks.check_extend(F16, HEADS, 16, [19, 1], [19, 40])["ok"]
