"""What the CPU's products in integers compute, in plain torch: weights as they were rounded, and
the input of each product rounded to 127ths of the greatest number of its group."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quire.engine.body.grouped_linear import GroupedLinear, GroupedWeight
from quire.engine.devices.cpu.packing import rounded

GROUP = 32


def round_rows(x: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """Return x `[…, features]`, each group of which is rounded to 127ths of its greatest number."""
    groups = x.unflatten(-1, (-1, group))
    most = groups.abs().amax(dim=-1, keepdim=True)
    numbers = (groups * (127 / most.clamp(min=1e-30))).round()
    return (numbers * (most / 127)).flatten(-2)


def round_inputs(model: nn.Module) -> None:
    """Have every linear layer of a model round its input, and every expert."""

    def hook(linear: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        group = linear.grouped.group_size if isinstance(linear, GroupedLinear) else GROUP
        return (round_rows(inputs[0], group), *inputs[1:])

    for module in model.modules():
        if isinstance(module, nn.Linear | GroupedLinear):
            module.register_forward_pre_hook(hook)
        elif hasattr(module, "is_transposed"):
            module.forward = partial(run_experts, module)  # type: ignore[method-assign]


def run_experts(
    experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run the experts of a mixture on rounded inputs: hidden `[T, hidden_size]`, chosen experts and
    their weights `[T, k]`."""
    out = torch.zeros_like(hidden)
    for expert in range(experts.num_experts):
        rows, places = torch.where(chosen == expert)
        product = F.linear(round_rows(hidden[rows]), experts.gate_up_proj[expert])
        gate, up = product.chunk(2, dim=-1)
        inner = round_rows(experts.act_fn(gate) * up)
        found = F.linear(inner, experts.down_proj[expert])
        out.index_add_(0, rows, found * weights[rows, places, None])
    return out


@torch.no_grad()
def round_model(model: Any, quantization: str) -> None:
    """Round the weights and the inputs of all linear layers as `--quantization` does."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            made = rounded(module.weight, "int8" if module is head else quantization)
            assert isinstance(made, GroupedWeight)
            module.weight = nn.Parameter(made.dense()[:, : module.in_features])
    round_inputs(model)
