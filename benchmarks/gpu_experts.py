"""Check and time a mixture of experts, and what transformers runs in its place."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_attention_checks import verdict
from gpu_common import DEVICE, Record, time_graph

from quire.kernels import reference
from quire.kernels.cuda.run_experts import Clamp, run_experts

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))
from paged import relative_error  # noqa: E402

BF16 = torch.bfloat16
QWEN3_MOE = (128, 8, 2048, 768)
"""Experts, experts of a token, hidden and inner size of a layer of Qwen3-30B-A3B."""
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_mixture(num_tokens: int, shape: tuple[int, ...], dtype: torch.dtype) -> Parts:
    """Return tokens, their experts and weights, and the weights of all experts."""
    number, top_k, hidden, size = shape
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    scores = torch.rand(num_tokens, number, device=DEVICE)
    weights, chosen = scores.topk(top_k, dim=1)
    gate_up = (torch.randn(number, 2 * size, hidden, device=DEVICE) / hidden**0.5).to(dtype)
    down = (torch.randn(number, hidden, size, device=DEVICE) / size**0.5).to(dtype)
    return x, chosen, weights.to(dtype), gate_up, down


def check_experts(
    dtype: torch.dtype, num_tokens: int, shape: tuple[int, ...], clamp: Clamp | None = None
) -> Record:
    """Check the kernel against float64; with a clamped gate, biases too."""
    x, chosen, weights, gate_up, down = random_mixture(num_tokens, shape, dtype)
    biases: dict[str, torch.Tensor] = {}
    if clamp is not None:
        biases = {
            "gate_up_bias": torch.randn(gate_up.shape[:2], device=DEVICE).to(dtype),
            "down_bias": torch.randn(down.shape[:2], device=DEVICE).to(dtype),
        }
    found = run_experts(x, chosen, weights, gate_up, down, clamp=clamp, **biases)
    wide = reference.run_experts(
        x.double(), chosen, weights.double(), gate_up.double(), down.double(), clamp=clamp,
        **{name: bias.double() for name, bias in biases.items()},
    )  # fmt: skip
    return verdict(dtype, relative_error(found, wide))


def by_torch(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Run a mixture by torch's grouped product, in as many operations as transformers does."""
    top_k = chosen.shape[1]
    experts, order = chosen.flatten().sort()
    counts = torch.histc(experts.int(), bins=len(down), min=0, max=len(down) - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    inner = F.grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=ends)
    gate, up = inner.chunk(2, dim=-1)
    outer = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    outer = outer * weights.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return outer[back].view(len(x), top_k, -1).sum(dim=1).to(x.dtype)


def time_experts(how: str, num_tokens: int) -> Record:
    """Time a layer of Qwen3-30B-A3B: "kernel", or "torch" by its grouped product. Several choices
    of experts take turns, so that no cache holds those of one token."""
    x, _, _, gate_up, down = random_mixture(num_tokens, QWEN3_MOE, BF16)
    calls = []
    for _ in range(16 if num_tokens < 64 else 2):
        _, chosen, weights, _, _ = random_mixture(num_tokens, (QWEN3_MOE[0], 8, 16, 16), BF16)
        run = run_experts if how == "kernel" else by_torch
        calls.append(functools.partial(run, x, chosen, weights, gate_up, down))
    seconds = time_graph(calls)
    products = 6 * num_tokens * QWEN3_MOE[1] * QWEN3_MOE[2] * QWEN3_MOE[3]
    return {"us": seconds * 1e6, "tflop_s": products / seconds / 1e12}
