"""Cuts a model's layers for one rank, in place, before anything merges or packs their weights."""

from __future__ import annotations

import logging
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..body.grouped_linear import GroupedLinear, GroupedWeight
from ..errors import UnsupportedModelError
from .adapter_cuts import LinearCut
from .tensor_plan import COLWISE, EXPERTS, PACKED, ROWWISE, Heads, body_plan, find_cuts

if TYPE_CHECKING:
    from collections import abc

    from .group import Group

logger = logging.getLogger("quire.engine")

Linear = nn.Linear | GroupedLinear

_NORMED = {"q_proj": "q_norm", "k_proj": "k_norm"}
"""Norms after layers of an attention."""


def part(size: int, group: Group) -> slice:
    """Return the rank's equal share of `size` rows or columns."""
    step = size // group.size
    return slice(group.rank * step, (group.rank + 1) * step)


def kv_part(size: int, kv_heads: int, group: Group) -> slice:
    """Return the rank's rows of K or V `[size]`, which has `kv_heads`: whole heads. If there are
    more ranks than heads, the head of the rank's queries."""
    width = size // kv_heads
    count = max(1, kv_heads // group.size)
    first = group.rank * kv_heads // group.size
    return slice(first * width, (first + count) * width)


class RowLinear(nn.Module):
    """A linear layer of which each rank has some input columns: the ranks' products are summed,
    then the bias is added once. x `[..., in_features]`, the rank's part → `[..., out_features]`."""

    linear: nn.Module
    sums_ranks = True
    """What adapters add belongs to `linear`: see adapters/adapted_linear.py."""

    def __init__(self, linear: Linear, bias: torch.Tensor | None, group: Group) -> None:
        """`linear` has the rank's columns and no bias."""
        super().__init__()
        self.linear = linear
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._group = group

    @property
    def weight(self) -> torch.Tensor:
        """The rank's columns of the weight, for code that looks at it."""
        weight: torch.Tensor = self.linear.weight  # type: ignore[assignment]
        return weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self._group.all_reduce(self.linear(input))
        return output if self.bias is None else output + self.bias


class SharedNorm(nn.Module):
    """RMSNorm over groups of channels of which each rank has some, with a gate or without. The sums
    of squares of the groups are made by all ranks together; a group may lie on several.

    y = w · x / √(mean over the group of x² + ε). With a gate, x · silu(gate) is in the place of x,
    or y · silu(gate) in that of y if the layer norms before its gate, as Mamba-2 layers have it.
    """

    def __init__(
        self, norm: Any, own: slice, groups: int, group: Group, *, copies: int = 1
    ) -> None:
        """`norm` is the whole layer, of `groups` groups, and `own` are the rank's channels, which
        as many ranks have as there are `copies`."""
        super().__init__()
        whole = norm.weight.detach()
        self.weight = nn.Parameter(whole[own].clone(), requires_grad=False)
        self.variance_epsilon: float = norm.variance_epsilon
        self.norm_before_gate: bool = getattr(norm, "norm_before_gate", False)
        self._width = len(whole) // groups
        self._num_groups, self._copies = groups, copies
        # The rank's channels are whole groups, or lie in one.
        self._first = own.start // self._width
        self._own_groups = max(1, (own.stop - own.start) // self._width)
        self._group = group

    def forward(
        self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden_states and gate `[..., channels]`, the rank's → the same shape."""
        x = hidden_states.float()
        if gate is not None and not self.norm_before_gate:
            x = x * F.silu(gate.float())
        parts = x.reshape(*x.shape[:-1], self._own_groups, -1)
        sums = parts.pow(2).sum(-1)
        if self._own_groups * self._group.size != self._num_groups:  # several ranks have a group
            every = sums.new_zeros(*sums.shape[:-1], self._num_groups)
            every[..., self._first : self._first + self._own_groups] = sums
            sums = self._group.all_reduce(every)[..., self._first : self._first + self._own_groups]
        means = sums[..., None] / (self._width * self._copies)
        x = (parts * torch.rsqrt(means + self.variance_epsilon)).flatten(-2)
        x = x.to(hidden_states.dtype) * self.weight
        if gate is not None and self.norm_before_gate:
            x = x * F.silu(gate.float())
        return x.to(hidden_states.dtype)


class VocabLinear(nn.Module):
    """A language-model head of which each rank has some rows. Hidden states `[R, hidden_size]` →
    logits of the whole vocabulary, on every rank."""

    def __init__(self, linear: Linear, out_features: int, group: Group) -> None:
        """`linear` has the rank's rows; all ranks have as many, zeros beyond `out_features`."""
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, out_features
        self._group = group

    @property
    def weight(self) -> torch.Tensor:
        """The rank's rows of the weight, for code that looks at it."""
        weight: torch.Tensor = self.linear.weight
        return weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = self.linear(input.reshape(-1, self.in_features))
        logits = self._group.gather_columns(rows)
        if logits.shape[1] > self.out_features:
            logits = logits[:, : self.out_features].contiguous()
        return logits.view(*input.shape[:-1], self.out_features)


def cut_tensors(
    model: Any, body: nn.Module, heads: Heads, group: Group, architecture: str
) -> dict[str, LinearCut]:
    """Leave the rank's part of every layer of a transformers model, in place. `body` is the part of
    it that text passes through, and `heads` are the whole model's. Returns how the body's linear
    layers were cut, by their names in it. Raises UnsupportedModelError if a layer cannot be cut."""
    cuts = cut_body(body, body_plan(model.config), heads, group, architecture)
    cut_head(model, group)
    if heads.kv < group.size:
        logger.warning(
            "%d ranks share %d KV heads: each has one, so the KV cache takes %d times as much "
            "memory in all",
            group.size,
            heads.kv,
            group.size // heads.kv,
        )
    return cuts


def round_cut_layers(
    body: nn.Module,
    plan: dict[str, str],
    size: int,
    architecture: str,
    rounded: abc.Callable[[torch.Tensor], torch.Tensor | GroupedWeight],
    of_states: abc.Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Round the weights of the linear layers that `size` ranks are going to share, in place, while
    they are whole: so the ranks' integers and scales are together those of one rank. `of_states`
    are the styles of those in layers with a state. Experts are rounded when they are packed. Raises
    UnsupportedModelError if groups would be cut apart."""
    for name, style in {**find_cuts(body, plan, architecture), **of_states}.items():
        module = body.get_submodule(name)
        if type(module) is not nn.Linear:
            continue
        grouped = rounded(module.weight.detach())
        assert isinstance(grouped, GroupedWeight)
        if grouped.shape[1] == module.in_features:
            layer = GroupedLinear(grouped, module.bias, module.weight.dtype)
            body.set_submodule(name, layer)
        elif style == ROWWISE:  # the last group is filled up; rows of such a layer can be cut
            raise UnsupportedModelError(
                f"{architecture}: {name} has {module.in_features} inputs, whose groups of "
                f"{grouped.group_size} weights {size} ranks cannot share"
            )


def cut_scales(scales: torch.Tensor, layers: range, group: Group) -> torch.Tensor:
    """Return the rank's part of the scales of a KV cache `[num_layers, 2, num_kv_heads]`; `layers`
    are those of its stage."""
    heads = scales.shape[2]
    part = scales[layers.start : layers.stop, :, kv_part(heads, heads, group)]
    return part.contiguous()


def cut_body(
    body: nn.Module, plan: dict[str, str], heads: Heads, group: Group, architecture: str
) -> dict[str, LinearCut]:
    """Leave the rank's part of each layer that the plan cuts; `heads` are the whole model's.
    Returns how linear layers were cut, by name. Raises UnsupportedModelError if a layer cannot be
    cut."""
    cuts: dict[str, LinearCut] = {}
    for name, style in find_cuts(body, plan, architecture).items():
        parent, child = _places(body, name)
        module: Any = getattr(parent, child)
        if style == EXPERTS:
            _cut_experts(module, group, f"{architecture}: {name}")
            continue
        check_linear(module, f"{architecture}: {name}")
        if style in (COLWISE, PACKED):
            rows: slice | torch.Tensor = part(module.out_features, group)
            if child in ("k_proj", "v_proj"):
                rows = kv_part(module.out_features, heads.kv, group)
            elif style == COLWISE:
                _check_divides(module.out_features, group, f"{architecture}: {name}")
            else:
                half = module.out_features // 2
                _check_divides(half, group, f"{architecture}: {name}")
                own = torch.arange(half)[part(half, group)]
                rows = torch.cat([own, half + own])
            cuts[name] = LinearCut(rows=rows)
            setattr(parent, child, some_rows(module, rows))
            if child in _NORMED and isinstance(rows, slice):
                number = heads.query if child == "q_proj" else heads.kv
                _share_norm(parent, _NORMED[child], rows, module.out_features, number, group)
        else:
            _check_divides(module.in_features, group, f"{architecture}: {name}")
            columns = part(module.in_features, group)
            cuts[name] = LinearCut(columns=columns)
            linear = some_columns(module, columns, f"{architecture}: {name}", group.size)
            setattr(parent, child, RowLinear(linear, module.bias, group))
    return cuts


def _share_norm(
    attention: nn.Module, name: str, own: slice, size: int, heads: int, group: Group
) -> None:
    """Let ranks share a norm over all `size` numbers of Q or K, if the attention has one. One over
    the numbers of each of the `heads` stays as it is."""
    norm: Any = getattr(attention, name, None)
    weight = getattr(norm, "weight", None)
    if heads > 1 and weight is not None and len(weight) == size:
        copies = max(1, group.size // heads)
        setattr(attention, name, SharedNorm(norm, own, 1, group, copies=copies))


def cut_head(model: Any, group: Group) -> None:
    """Leave the rank's rows of a causal language model's head. Those of a tied head stay views of
    the embedding. A head that is no linear layer stays whole."""
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, GroupedLinear):
        return
    rows = -(-head.out_features // group.size)
    which = slice(group.rank * rows, (group.rank + 1) * rows)
    bias = _rows_of(head.bias, which)
    missing = rows - len(range(*which.indices(head.out_features)))
    if missing and bias is not None:
        bias = F.pad(bias, (0, missing))
    linear: Linear
    if isinstance(head, GroupedLinear):
        grouped = head.grouped.rows(which).copy().padded(missing)
        linear = GroupedLinear(grouped, _copied(bias), head.dtype)
    else:
        weight = head.weight.detach()[which]
        if missing:
            weight = F.pad(weight, (0, 0, 0, missing))
        linear = _linear(weight, bias, copy=False)
    model.set_output_embeddings(VocabLinear(linear, head.out_features, group))


def _cut_experts(experts: Any, group: Group, what: str) -> None:
    """Leave the rank's part of each expert's intermediate size; their outputs are summed."""
    names = sorted(name for name, _ in experts.named_parameters(recurse=False))
    if names not in (["down_proj", "gate_up_proj"], ["down_proj", "up_proj"]):
        raise UnsupportedModelError(
            f"{what} has the parameters {', '.join(names)}, which cannot be cut"
        )
    if getattr(experts, "is_transposed", False):
        raise UnsupportedModelError(f"{what} has transposed weights, which cannot be cut")
    up, down = getattr(experts, names[1]).detach(), experts.down_proj.detach()
    _check_divides(down.shape[2], group, what)
    columns = part(down.shape[2], group)
    parts = [one[:, columns] for one in up.split(down.shape[2], dim=1)]  # the gate may be one
    setattr(experts, names[1], _parameter(torch.cat(parts, dim=1)))
    experts.down_proj = _parameter(down[:, :, columns])
    experts.intermediate_dim = down.shape[2] // group.size
    experts.register_forward_hook(partial(_sum_output, group))


def _sum_output(group: Group, _: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
    return group.all_reduce(output)


def check_linear(module: nn.Module, what: str) -> None:
    """Raise UnsupportedModelError if a module is no linear layer of a kind that can be cut."""
    if type(module) not in (nn.Linear, GroupedLinear):
        raise UnsupportedModelError(f"{what} is a {type(module).__name__}, which cannot be cut")


def _places(body: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, child = name.rpartition(".")
    return body.get_submodule(parent), child


def _check_divides(size: int, group: Group, what: str) -> None:
    if size % group.size:
        raise UnsupportedModelError(
            f"{what} has a size of {size}, which {group.size} ranks cannot share equally"
        )


def _rows_of(bias: torch.Tensor | None, rows: slice | torch.Tensor) -> torch.Tensor | None:
    return None if bias is None else bias.detach()[rows]


def some_rows(module: Linear, rows: slice | torch.Tensor) -> Linear:
    """Return a layer of some rows, with a copy of their weight."""
    bias = _rows_of(module.bias, rows)
    if isinstance(module, GroupedLinear):
        return GroupedLinear(module.grouped.rows(rows).copy(), _copied(bias), module.dtype)
    return _linear(module.weight[rows], bias)


def some_columns(module: Linear, columns: slice, what: str, size: int) -> Linear:
    """Return a layer of some columns and without a bias, with a copy of their weight. Raises
    UnsupportedModelError if they cut groups apart."""
    if isinstance(module, nn.Linear):
        return _linear(module.weight[:, columns], None)
    try:
        grouped = module.grouped.columns(columns)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{what} is quantised in groups of {module.grouped.group_size} inputs, of which "
            f"{size} ranks cannot have whole ones: {error}"
        ) from error
    return GroupedLinear(grouped.copy(), None, module.dtype)


def _copied(bias: torch.Tensor | None) -> nn.Parameter | None:
    return None if bias is None else _parameter(bias)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, *, copy: bool = True) -> nn.Linear:
    """Make a layer of this weight; a copy, so that the whole weight can be freed."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = _parameter(weight) if copy else nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = _parameter(bias)
    return linear.eval()


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copied, requires_grad=False)
