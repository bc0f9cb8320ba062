"""The functions that transformers' layers with a state call to mix tokens.

Those layers are modules whose `forward` projects, calls two functions of its own file by their
names, and projects again:

    causal_conv1d_fn                  the convolution
    torch_chunk_gated_delta_rule      or mamba2_chunk_scan: the recurrence; LFM2 has none

`bind_layers` lets `forward` find functions under these names that go through the packed rows of a
step, each with its own state, which they find in the `attn_metadata` that the model hands down.
Everything else stays transformers' code. `prove_layers` shows, layer by layer, that the result is
the same wherever a sequence is cut and whoever shares the step; a layer that mixes tokens in any
other way fails there.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ..errors import UnsupportedModelError
from .state_spec import StateSpec
from .step_states import StateOps, StepLayout, StepStates

CONVOLUTION = "causal_conv1d_fn"
DELTA_RULE = "torch_chunk_gated_delta_rule"
SCAN = "mamba2_chunk_scan"
"""Names of transformers' functions."""
_CUTS = (5, 6, 30)
"""Where the proof's sequence is cut: also around a single token, as in a decode, and before a piece
for which devices have another form of the recurrence."""
_lock = threading.Lock()
_levels: list[int] = []
"""The level of transformers' logger before each `quiet` that is in use."""


class StepRows(NamedTuple):
    """The layout of a step by itself: see `StepLayout`."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    states: StepStates


class _Mixers:
    """The functions of one layer. `index` is its place among the layers with a state."""

    def __init__(self, index: int, ops: StateOps) -> None:
        self._index = index
        self._ops = ops
        self._packed: Any = None

    def convolve(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        *,
        attn_metadata: StepLayout,
        **_: Any,
    ) -> torch.Tensor:
        """Replace `causal_conv1d_fn`: hidden_states `[1, channels, T]` → the same shape."""
        states = _states_of(attn_metadata)
        if self._packed is None:  # the filter is never changed
            self._packed = self._ops.pack_filter(weight, bias)
        x, layer = hidden_states[0].T, states.convolution[self._index]
        out = self._ops.convolve(x, self._packed, layer, attn_metadata)
        if activation is not None:
            out = ACT2FN[activation](out)
        return out.T[None]

    def apply_delta_rule(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *,
        use_qk_l2norm_in_kernel: bool = False,
        attn_metadata: StepLayout,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Replace `torch_chunk_gated_delta_rule`: query and key `[1, T, key_heads, key_dim]`, value
        `[1, T, heads, value_dim]`, g (a logarithm) and beta `[1, T, heads]` → like value."""
        states = _states_of(attn_metadata)
        out = self._ops.recur(
            query[0],
            key[0],
            value[0],
            g[0].float(),
            beta[0].float(),
            states.recurrent[self._index],
            attn_metadata,
            scale=query.shape[-1] ** -0.5,
            normalise=use_qk_l2norm_in_kernel,
        )
        return out[None].to(query.dtype), None

    def scan(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        attn_metadata: StepLayout,
        **_: Any,
    ) -> torch.Tensor:
        """Replace `mamba2_chunk_scan`: hidden_states `[1, T, heads, head_dim]`, dt `[1, T, heads]`,
        A and D `[heads]`, B and C `[1, T, groups, state_size]` → like hidden_states, float32."""
        states = _states_of(attn_metadata)
        # 1. The time steps, as transformers computes them.
        if dt_bias is not None:
            dt = dt + dt_bias.to(dt.dtype)
        if dt_softplus:
            dt = F.softplus(dt)
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
        # 2. The recurrence: the state takes in x·dt along B, and is read along C.
        x = hidden_states.float()
        out = self._ops.recur(
            C[0],
            B[0],
            (x * dt[..., None])[0],
            (dt * A.float())[0],
            None,
            states.recurrent[self._index],
            attn_metadata,
            scale=1.0,
            normalise=False,
        )[None]
        return out if D is None else out + D[..., None] * x


def _states_of(layout: StepLayout) -> StepStates:
    assert layout.states is not None
    return layout.states


def find_layers(body: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a state below a transformers model's body, by name, in the order of
    the layers."""
    return {
        name: module
        for name, module in body.named_modules()
        if (code := getattr(_forward_of(module), "__code__", None)) is not None
        and CONVOLUTION in code.co_names
    }


def _forward_of(module: nn.Module) -> Any:
    """Return the `forward` of a module's class, without decorators."""
    return inspect.unwrap(type(module).forward)


def bind_layers(layers: abc.Iterable[nn.Module], ops: StateOps) -> None:
    """Let layers with a state, in their order, call this module's functions from now on, with the
    operations of a device."""
    for index, module in enumerate(layers):
        mixers, forward = _Mixers(index, ops), _forward_of(module)
        known = {
            CONVOLUTION: mixers.convolve,
            DELTA_RULE: mixers.apply_delta_rule,
            SCAN: mixers.scan,
        }
        bound = FunctionType(
            forward.__code__,
            {**forward.__globals__, **known},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        bound.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(bound, module)


def allocate_states(
    spec: StateSpec, num_slots: int, num_tokens: int, device: torch.device
) -> StepStates:
    """Return zeroed states of a few slots, of which rows use none."""
    layers = (spec.num_layers, num_slots)
    matrices = (*layers, spec.heads, spec.key_dim, spec.value_dim)
    none = torch.full((max(num_slots, num_tokens),), -1, dtype=torch.int32, device=device)
    return StepStates(
        torch.zeros(*layers, spec.taps, spec.channels, dtype=torch.float32, device=device),
        torch.zeros(matrices, dtype=torch.float32, device=device),
        none,
        none.clone(),
    )


@torch.no_grad()
def prove_layers(
    layers: abc.Mapping[str, nn.Module],
    spec: StateSpec,
    hidden_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Raise UnsupportedModelError unless each layer, bound, gives for a sequence in pieces, beside
    another one, what transformers' code gives for it at once. hidden_size, device and dtype are
    those of the layers' inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _CUTS[-1], hidden_size, generator=generator).to(device, dtype)
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps)
    states = allocate_states(spec, 3, 2 * len(x[0]), device)
    for name, module in layers.items():
        with quiet():
            expected = _forward_of(module)(module, x).float()
        found = _run_pieces(module, x, states).float()
        difference, norm = float((found - expected).norm()), float(expected.norm())
        if not difference <= tolerance * norm:
            raise UnsupportedModelError(
                f"{name} keeps a state in a way that is not known: the tokens of a sequence do not "
                f"give the same in parts (they differ by {difference / (norm or 1.0):.1g})"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from advising packages that would make its own functions faster. Several
    threads may do so at the same time."""
    logger = logging.getLogger("transformers")
    with _lock:
        _levels.append(logger.level)
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _lock:  # the level from before the first one returns after the last one
            level = _levels.pop()
            if not _levels:
                logger.setLevel(level)


def _run_pieces(module: nn.Module, x: torch.Tensor, states: StepStates) -> torch.Tensor:
    """Run a bound layer over a sequence x `[1, T, hidden_size]` in pieces, each of them as the
    second row of a step, after a row that begins another sequence. The state goes on in another
    slot after the first piece, which is a snapshot."""
    outputs, begin = [], 0
    for end in _CUTS:
        piece = torch.cat([x[:, : end - begin].flip(1), x[:, begin:end]], dim=1)
        size = end - begin
        states.slots[:2] = states.slots.new_tensor([0, 1 if begin == 0 else 2])
        states.saves.fill_(-1)
        if begin == 0:
            states.saves[2 * size - 1] = 2
        layout = StepRows(
            states.slots.new_tensor([0, size, 2 * size]),
            states.slots.new_tensor([size, end]),
            size,
            states,
        )
        outputs.append(module(piece, attn_metadata=layout)[:, size:])
        begin = end
    return torch.cat(outputs, dim=1)
