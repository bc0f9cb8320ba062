"""The experts of a mixture on the CPU: the weights of all of them as panels, one parallel region a
layer.

transformers keeps the experts of a layer as three-dimensional parameters of one module, and has an
interface for functions that run it (ExpertsInterface); this is such a function. Rows are sorted by
their experts, each expert multiplies its own, and each token sums up its rows in the order of its
experts: what a token gets does not depend on the others. Importing this loads Numba.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from ....kernels.cpu.arrays import FLOATS, as_array, thread_count
from ....kernels.cpu.norms import FEW, Pick, pick
from ....kernels.cpu.panels import PANEL_COLUMNS
from ....kernels.cpu.products import (
    Blend,
    Call,
    PackedWeight,
    blend,
    count_few,
    make_quantised,
    make_segments,
    make_tiles,
    run_product,
)
from ....kernels.cpu.region import run_calls
from ...body.grouped_rows import GroupedStack
from .packed_linear import PackedLinear
from .packing import by_panel, pack_weight, rounded

IMPLEMENTATION = "quire_experts"
"""The name under which transformers knows `run_experts`."""


class PackedExperts:
    """The weights of all experts of a layer."""

    def __init__(self, experts: Any, quantization: str | None) -> None:
        """Take over the weights of a transformers module, which are emptied."""
        self._is_fused = _is_silu_gated(experts)
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        self.up, self.up_size = _take(experts, first, 2 if self._is_fused else 1, quantization)
        self.down, self.down_size = _take(experts, "down_proj", 1, quantization)

    def __call__(
        self, experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden `[T, hidden_size]`, chosen experts and their weights `[T, k]` → like hidden."""
        # 1. Rows in the order of their experts: row r is that of token order[r] // k.
        flat = chosen.reshape(-1).numpy()
        order = np.argsort(flat, kind="stable")
        used, counts = np.unique(flat, return_counts=True)
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        source = as_array(hidden.float())
        rows = np.empty((len(order), source.shape[1]), np.float32)
        tokens = np.ascontiguousarray(order // chosen.shape[1])
        calls: list[tuple[Call, int]] = [((pick, Pick(source, tokens, rows)), -(-len(rows) // FEW))]
        # 2. Gate and up. Gated by SiLU, they are one kernel; else transformers' code comes between.
        size = self.up_size // 2 if self._is_fused else self.up_size
        inner = np.empty((len(rows), size), np.float32)
        self._add(calls, self.up, rows, inner, used, counts, gated=self._is_fused)
        if not self._is_fused:
            _run(calls, len(rows))
            calls = []
            activated = torch.from_numpy(inner)
            apply = experts._apply_gate if experts.has_gate else experts.act_fn
            inner = as_array(apply(activated))
        # 3. Down, and the sum of each token's rows.
        outer = np.empty((len(rows), self.down_size), np.float32)
        self._add(calls, self.down, inner, outer, used, counts, gated=False)
        out = np.empty((len(source), self.down_size), np.float32)
        mixed = Blend(outer, places.reshape(chosen.shape), as_array(weights.float()), out)
        _run([*calls, ((blend, mixed), len(out))], len(rows))
        return torch.from_numpy(out).to(hidden.dtype)

    def _add(
        self,
        calls: list[tuple[Call, int]],
        weight: PackedWeight,
        x: Any,
        out: Any,
        used: Any,
        counts: Any,
        *,
        gated: bool,
    ) -> None:
        """Append the kernels of one product, of each expert's rows with its panels."""
        room = make_quantised(len(x), weight.depth, weight.num_groups)
        tiles = make_tiles(thread_count())
        quantise = weight.quantise(x, room, tiles)
        if quantise is not None:
            calls.append((quantise, count_few(len(x))))
        columns = -(-out.shape[1] // PANEL_COLUMNS)
        segments, items = make_segments(used, counts, columns)
        if gated:
            call = weight.multiply_gated(x, room, out, tiles, segments)
        else:
            call = weight.multiply(x, room, out, tiles, False, segments)
        calls.append((call, items))


def pack_experts(body: Any, *, quantization: str | None = None) -> int:
    """Pack the weights of all experts below `body`, and have transformers run them by this module's
    function. `quantization` is that of `pack`. Returns the number of layers with experts."""
    packed = 0
    for parent in list(body.modules()):
        for module in list(parent.children()):
            if _can_pack(module):
                module.quire_experts = PackedExperts(module, quantization)
                _pack_router(parent, module.num_experts)
                packed += 1
    if packed:
        ExpertsInterface.register(IMPLEMENTATION, run_experts)
        body.set_experts_implementation(IMPLEMENTATION)
    return packed


class RouterWeight(torch.Tensor):
    """A weight `[experts, hidden_size]` that F.linear multiplies by as panels: routers of
    transformers are modules that call it. torch's own product gives a row other bits in another
    batch, and so perhaps other experts."""

    packed: PackedWeight

    @classmethod
    def of(cls, weight: torch.Tensor) -> RouterWeight:
        """Return the same weight, which is in memory twice."""
        made = weight.detach().as_subclass(cls)
        made.packed = pack_weight(weight.detach(), None)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and len(args) >= 2 and hasattr(args[1], "packed"):
            x, weight, bias = (*args, (kwargs or {}).get("bias"))[:3]
            rows = x.reshape(-1, x.shape[-1])
            out = torch.empty(len(rows), len(weight))
            num_threads = thread_count()
            numba.set_num_threads(num_threads)
            run_product(weight.packed, as_array(rows.float()), len(rows), out.numpy(), num_threads)
            out = out.to(x.dtype).view(*x.shape[:-1], len(weight))
            return out if bias is None else out + bias
        return super().__torch_function__(  # type: ignore[no-untyped-call]
            func, types, args, kwargs or {}
        )


def _pack_router(parent: nn.Module, num_experts: int) -> None:
    """Pack the weight of the module beside the experts that chooses among them. It is not rounded:
    another expert makes more of a difference than a few bits."""
    for name, child in list(parent.named_children()):
        weight = getattr(child, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or len(weight) != num_experts:
            continue
        if type(child) is nn.Linear:
            setattr(parent, name, PackedLinear(child))
        else:
            del child.weight
            child.weight = RouterWeight.of(weight)


def run_experts(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run a module of experts whose weights are packed."""
    result: torch.Tensor = experts.quire_experts(experts, hidden_states, top_k_index, top_k_weights)
    return result


def _can_pack(module: nn.Module) -> bool:
    """Whether a module's experts are run through transformers' interface, in a way known here."""
    weight = getattr(module, "down_proj", None)
    if isinstance(weight, GroupedStack):
        return True
    known = all(hasattr(module, name) for name in ("is_transposed", "has_bias", "has_gate"))
    return (
        known
        and isinstance(weight, nn.Parameter)
        and weight.ndim == 3
        and weight.dtype in FLOATS
        and not getattr(module, "has_post_expert_norm", False)
    )


def _is_silu_gated(experts: Any) -> bool:
    """Whether gate and up are the halves of one product, and combine as silu(gate) * up."""
    if not experts.has_gate or not experts.is_concatenated:
        return False
    probe = torch.linspace(-20, 20, 64)[None]
    gate, up = probe.chunk(2, dim=-1)
    return torch.equal(experts._apply_gate(probe), F.silu(gate) * up)


def _take(
    experts: Any, name: str, parts: int, quantization: str | None
) -> tuple[PackedWeight, int]:
    """Pack the weights of all experts `[E, out, in]`, one after the other, and empty the parameter.
    Returns them, and the number of columns of each."""
    weight = getattr(experts, name)
    if isinstance(weight, GroupedStack):
        return _take_stack(experts, name, parts)
    weight = weight.detach()
    if experts.is_transposed:
        weight = weight.transpose(1, 2)
    bias = getattr(experts, f"{name}_bias").detach() if experts.has_bias else None
    # Rows in the order of panels, so that each expert has whole ones.
    ordered = torch.cat([by_panel(each, parts).flatten(0, 1) for each in weight])
    if bias is not None:
        bias = torch.cat([by_panel(each, parts).flatten() for each in bias])
    packed = pack_weight(rounded(ordered, quantization), bias)
    empty = nn.Parameter(weight.new_empty(0), requires_grad=False)
    setattr(experts, name, empty)
    return packed, weight.shape[1]


def _take_stack(experts: Any, name: str, parts: int) -> tuple[PackedWeight, int]:
    """Do what `_take` does, for experts whose weights are grouped. (None of them has biases.)"""
    stack: GroupedStack = getattr(experts, name)
    num_experts, rows, _ = stack.shape
    # What fills up the last panel of an expert is some row: what comes of it is dropped.
    panels = by_panel(torch.arange(rows), parts).flatten()
    ordered = torch.cat([expert * rows + panels for expert in range(num_experts)])
    packed = pack_weight(stack.grouped.rows(ordered), None)
    delattr(experts, name)
    setattr(experts, name, nn.Parameter(torch.empty(0), requires_grad=False))
    return packed, rows


def _run(calls: list[tuple[Call, int]], rows: int) -> None:
    num_threads = thread_count()
    numba.set_num_threads(num_threads)
    run_calls(calls, rows, num_threads)
