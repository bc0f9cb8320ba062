"""The experts of a mixture on CUDA: one grouped product for gate and up, one for down.

transformers keeps the experts of a layer as three-dimensional parameters of one module, and has an
interface for functions that run it (ExpertsInterface); this is such a function, for layers that run
flat and for those of transformers' code. Importing this loads Triton.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from .....kernels.checks import FLOAT_DTYPES
from .....kernels.cuda.tuning import expert_configs
from ....errors import UnsupportedModelError
from .kernels import Kernels

logger = logging.getLogger("quire.engine")

IMPLEMENTATION = "quire_grouped_experts"
"""The name under which transformers knows `_run`."""
Clamp = tuple[float, float]


class _Gate(NamedTuple):
    """silu(gate) · up, or with a `clamp` the clamped gate, see `run_experts`."""

    clamp: Clamp | None


class GroupedExperts:
    """The weights of all experts of a layer, as the kernel reads them."""

    def __init__(self, experts: Any, gate: _Gate, kernels: Kernels) -> None:
        """Take over the weights of a transformers module. Those that lie otherwise than the kernel
        reads them are laid out again, and the parameter is emptied."""
        self._kernels = kernels
        self._clamp = gate.clamp
        self._gate_up, self._gate_up_bias = _take(experts, "gate_up_proj", experts.is_concatenated)
        self._down, self._down_bias = _take(experts, "down_proj", True)
        self._known_top_k = 0

    def __call__(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden `[T, hidden_size]`, chosen experts and their weights `[T, k]` → like hidden."""
        if chosen.shape[1] != self._known_top_k:
            # The first call, which is no request's: every shape of tiles is compiled now.
            self._known_top_k = chosen.shape[1]
            for config in expert_configs(hidden.dtype):
                self._run(hidden[:1], chosen[:1], weights[:1], config=config)
        return self._run(hidden, chosen, weights)

    def _run(self, *inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        return self._kernels.run_experts(
            *inputs,
            self._gate_up,
            self._down,
            gate_up_bias=self._gate_up_bias,
            down_bias=self._down_bias,
            clamp=self._clamp,
            **options,
        )


@torch.no_grad()
def use_experts(body: Any, kernels: Kernels) -> int:
    """Let the kernel run all experts below `body`, in place, if it can. Returns the number of
    layers with experts that it runs.

    Raises UnsupportedModelError if it does not give what transformers' code gives for some tokens.
    """
    found = [module for module in body.modules() if _is_experts(module)]
    gates = [_gate_of(module) for module in found]
    if not found or any(gate is None for gate in gates):
        if found:
            logger.info("%s runs as transformers' code", type(found[0]).__name__)
        return 0
    # The modules are called, not the kernel: of several ranks, each has a part of every expert, and
    # a hook of the module adds the parts up.
    body.set_experts_implementation("eager")
    probes = [_probe_of(module) for module in found]
    expected = [module(*probe) for module, probe in zip(found, probes, strict=True)]
    for module, gate in zip(found, gates, strict=True):
        assert gate is not None
        module.quire_experts = GroupedExperts(module, gate, kernels)
    ExpertsInterface.register(IMPLEMENTATION, _run)
    body.set_experts_implementation(IMPLEMENTATION)
    for module, probe, wanted in zip(found, probes, expected, strict=True):
        _check_equal(module, module(*probe), wanted)
    return len(found)


def _run(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run a module of experts through the kernel."""
    result: torch.Tensor = experts.quire_experts(
        hidden_states, top_k_index.contiguous(), top_k_weights.contiguous()
    )
    return result


def _is_experts(module: Any) -> bool:
    """Whether transformers runs a module through its interface for experts."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_bias", "has_gate"))


def _gate_of(experts: Any) -> _Gate | None:
    """Return how gate and up combine; None if the kernel cannot run these experts."""
    weight = getattr(experts, "down_proj", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 3 or weight.dtype not in FLOAT_DTYPES:
        return None
    if not experts.has_gate or getattr(experts, "has_post_expert_norm", False):
        return None
    both = torch.linspace(-20, 20, 64, device=weight.device)[None]
    if experts.is_concatenated:
        gate, up = both.chunk(2, dim=-1)
    else:
        gate, up = both[:, ::2], both[:, 1::2]
    found = experts._apply_gate(both)
    if torch.allclose(found, F.silu(gate) * up):
        return _Gate(None)
    limit, alpha = getattr(experts, "limit", None), getattr(experts, "alpha", None)
    if isinstance(limit, float) and isinstance(alpha, float):
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if torch.allclose(found, gate * torch.sigmoid(alpha * gate) * (up + 1)):
            return _Gate((limit, alpha))
    return None


def _take(
    experts: Any, name: str, is_concatenated: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weights of all experts `[E, out, in]` and their biases `[E, out]`. If gate and up
    take turns in them, all of gate comes first now."""
    own = getattr(experts, name).detach()
    weight = own.transpose(1, 2) if experts.is_transposed else own
    bias = getattr(experts, f"{name}_bias").detach() if experts.has_bias else None
    if not is_concatenated:
        weight = torch.cat((weight[:, ::2], weight[:, 1::2]), dim=1)
        bias = None if bias is None else torch.cat((bias[:, ::2], bias[:, 1::2]), dim=1)
    weight = weight.contiguous()
    if weight.data_ptr() != own.data_ptr():
        setattr(experts, name, nn.Parameter(own.new_empty(0), requires_grad=False))
    return weight, None if bias is None else bias.contiguous()


def _probe_of(experts: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return some tokens, experts for each, and weights: as many as a token has, so that no kernel
    is compiled that serving does not launch."""
    weight = experts.down_proj
    num_experts, first, second = weight.shape
    size = second if experts.is_transposed else first
    top_k = min(getattr(experts.config, "num_experts_per_tok", None) or 2, num_experts)
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, size, generator=rng)
    chosen = torch.arange(3 * top_k).view(3, top_k) % num_experts
    weights = torch.rand(3, top_k, generator=rng)
    device = weight.device
    return hidden.to(device, weight.dtype), chosen.to(device), weights.to(device, weight.dtype)


def _check_equal(experts: Any, found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = float((found - expected).float().norm() / expected.float().norm())
    if not difference <= 4 * torch.finfo(found.dtype).eps + 1e-4:
        raise UnsupportedModelError(
            f"{type(experts).__name__}: quire's kernel does not give what transformers' code gives "
            f"(they differ by {difference:.1g})"
        )
