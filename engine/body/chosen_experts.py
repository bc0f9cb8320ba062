"""Experts whose inputs are scaled: Llama 4's, of which only the chosen ones need run.

    out = shared(x) + sum over the chosen experts e of  experts_e(sigmoid(score_e) · x)

transformers lets every expert run over every token, with inputs of zero for all that were not
chosen, which give zero. Here the rows of the chosen ones go through transformers' interface for
experts (ExpertsInterface), which devices have functions for.
"""

from __future__ import annotations

from collections import abc
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface


class _Routing(NamedTuple):
    num_experts_per_tok: int


class ChosenExperts(nn.Module):
    """The experts of a layer, for rows that have chosen one each. It has the attributes of the
    modules that transformers runs through its interface."""

    is_transposed = True
    is_concatenated = True
    has_gate = True
    has_bias = False

    def __init__(self, experts: Any) -> None:
        """Take over the weights of transformers' module."""
        super().__init__()
        self.num_experts: int = experts.num_experts
        self.gate_up_proj = experts.gate_up_proj
        self.down_proj = experts.down_proj
        self.act_fn = experts.act_fn
        self.config = _Routing(1)
        self.implementation = "eager"
        """The name of the function that runs them."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states `[T, hidden_size]`, chosen experts and weights `[T, 1]` → like the
        first."""
        run = ExpertsInterface().get_interface(self.implementation, ChosenExperts.run_each)
        result: torch.Tensor = run(self, hidden_states, top_k_index, top_k_weights)
        return result

    def run_each(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run one expert after the other."""
        out = torch.zeros_like(hidden_states)
        for expert in sorted(set(top_k_index[:, 0].tolist())):
            rows = (top_k_index[:, 0] == expert).nonzero()[:, 0]
            inner = self._apply_gate(hidden_states[rows] @ self.gate_up_proj[expert])
            out[rows] = (inner @ self.down_proj[expert]) * top_k_weights[rows]
        return out

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        product: torch.Tensor = up * self.act_fn(gate)
        return product


def choose_experts(body: Any) -> int:
    """Let the layers of a transformers model whose experts scale their inputs run the chosen ones
    only, in place. Returns the number of these layers."""
    found = []
    for module in body.modules():
        if type(module).__name__ == "Llama4TextMoe":
            module.experts = ChosenExperts(module.experts)
            module.forward = MethodType(_run_chosen, module)
            found.append(module.experts)
    if found:
        body.set_experts_implementation = partial(_set_implementation, found)
    return len(found)


def _set_implementation(experts: abc.Sequence[ChosenExperts], name: str) -> None:
    """Replace the method of the model, which knows no other experts than its own."""
    for each in experts:
        each.implementation = name


def _run_chosen(mixture: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace the forward of a Llama4TextMoe: hidden_states of any shape `[…, hidden_size]` →
    `[T, hidden_size]`, and the router's logits `[T, num_experts]`."""
    hidden = hidden_states.reshape(-1, mixture.hidden_dim)
    scores, logits = mixture.router(hidden)
    chosen = torch.topk(logits, mixture.top_k, dim=1).indices
    factors = scores.gather(1, chosen)
    # A row for each choice of each token.
    rows = (hidden[:, None] * factors[..., None]).flatten(0, 1)
    ones = rows.new_ones(len(rows), 1)
    routed = mixture.experts(rows, chosen.reshape(-1, 1), ones)
    out = mixture.shared_expert(hidden) + routed.view(len(hidden), mixture.top_k, -1).sum(dim=1)
    return out, logits
