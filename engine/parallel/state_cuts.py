"""Cuts the layers that keep a state for one rank, which has some heads or channels of each.

    gated delta rule   by heads of keys, each with its heads of values
    Mamba-2            by heads, each group's B and C with them
    short convolution  by channels

No plan of transformers cuts these layers, so each kind is known here by the attributes of its
module. As with attention, several ranks have the same head of keys, or group, if there are more
ranks than those. The input projections keep some rows, the convolution the same channels, and the
output projection columns, whose products are summed over the ranks.
"""

from __future__ import annotations

from collections import abc
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..errors import ConfigurationError, UnsupportedModelError
from .adapter_cuts import LinearCut
from .cut_layers import RowLinear, SharedNorm, check_linear, kv_part, part, some_columns, some_rows
from .tensor_plan import COLWISE, ROWWISE

if TYPE_CHECKING:
    from ..states.state_spec import StateSpec
    from .group import Group

_PER_HEAD = ("A_log", "D", "dt_bias")
"""Parameters with a number for each head."""


class StateCut(NamedTuple):
    """What a rank keeps of one layer with a state.

    `rows` are those of the layers that read the input, by name, and `columns` those of the layer
    `output`. The convolution `convolution` keeps `channels`, and other parameters, by name,
    `numbers`. `attributes` are the module's own sizes from then on. `norm` names a norm over all
    channels that several ranks share out, which keeps `columns` too, with the number of its groups.
    """

    rows: dict[str, torch.Tensor]
    output: str
    columns: slice
    convolution: str
    channels: torch.Tensor
    numbers: abc.Mapping[str, slice | torch.Tensor]
    attributes: dict[str, int]
    norm: tuple[str, int] | None = None


def check_states(size: int, spec: StateSpec, architecture: str) -> None:
    """Raise ConfigurationError if `size` ranks cannot share the states."""

    def fits(number: int) -> bool:
        if not spec.heads:
            return spec.channels % number == 0
        keys = spec.key_heads
        return spec.heads % number == 0 and (keys % number == 0 or number % keys == 0)

    if fits(size):
        return
    what = f"{spec.channels} channels"
    if spec.heads:
        what = f"{spec.heads} heads and {spec.key_heads} heads of keys"
    sizes = ", ".join(str(one) for one in range(1, (spec.heads or 8) + 1) if fits(one))
    raise ConfigurationError(
        f"--tensor-parallel-size {size} does not divide the {what} of the layers of {architecture} "
        f"that keep a state: choose from {sizes}"
    )


def find_styles(layers: abc.Mapping[str, nn.Module]) -> dict[str, str]:
    """Return how the linear layers of layers with a state are cut, by name, as a plan does."""
    found: dict[str, str] = {}
    for name, module in layers.items():
        outputs = ("out_proj", "o_proj")
        for child, linear in module.named_children():
            if isinstance(getattr(linear, "in_features", None), int):
                found[f"{name}.{child}"] = ROWWISE if child in outputs else COLWISE
    return found


@torch.no_grad()
def cut_states(
    layers: abc.Mapping[str, nn.Module], group: Group, architecture: str
) -> dict[str, LinearCut]:
    """Leave the rank's part of layers with a state, in place. Returns how their linear layers were
    cut, by name. Raises UnsupportedModelError if a layer is of no known kind."""
    cuts: dict[str, LinearCut] = {}
    for name, module in layers.items():
        where = f"{architecture}: {name}"
        cut = _find_cut(module, group, where)
        _check_whole(module, cut, where)
        for child in (*cut.rows, cut.output):
            check_linear(module.get_submodule(child), f"{where}.{child}")
        for child, rows in cut.rows.items():
            linear: Any = module.get_submodule(child)
            cuts[f"{name}.{child}"] = LinearCut(rows=rows)
            setattr(module, child, some_rows(linear, rows))
        output: Any = module.get_submodule(cut.output)
        cuts[f"{name}.{cut.output}"] = LinearCut(columns=cut.columns)
        linear = some_columns(output, cut.columns, f"{where}.{cut.output}", group.size)
        setattr(module, cut.output, RowLinear(linear, output.bias, group))
        _cut_convolution(module.get_submodule(cut.convolution), cut.channels)
        for tensor, numbers in cut.numbers.items():
            _cut_tensor(module, tensor, numbers)
        if cut.norm is not None:
            norm, groups = cut.norm
            shared = SharedNorm(module.get_submodule(norm), cut.columns, groups, group)
            setattr(module, norm, shared)
        for attribute, value in cut.attributes.items():
            setattr(module, attribute, value)
    return cuts


def _find_cut(module: Any, group: Group, where: str) -> StateCut:
    if hasattr(module, "num_k_heads"):
        return _delta_rule(module, group)
    if hasattr(module, "ssm_state_size") and hasattr(module, "n_groups"):
        return _mamba2(module, group)
    if hasattr(module, "conv") and hasattr(module, "in_proj"):
        return _short_convolution(module, group)
    raise UnsupportedModelError(
        f"{where} is a {type(module).__name__}, whose state ranks cannot share"
    )


def _check_whole(module: nn.Module, cut: StateCut, where: str) -> None:
    """Raise UnsupportedModelError if the module has a layer or a number that no rule cuts."""
    known = {*cut.rows, cut.output, cut.convolution, *cut.numbers}
    known |= {"norm", "o_norm"}  # over the numbers of one head, or shared
    odd = {name.partition(".")[0] for name, _ in module.named_parameters()} - known
    missing = {name for name in (*cut.rows, cut.output) if not hasattr(module, name)}
    if odd or missing:
        raise UnsupportedModelError(
            f"{where} has other layers than those of its kind that ranks can share: "
            f"{', '.join(sorted(odd | missing))}"
        )


def _numbers(which: slice) -> torch.Tensor:
    return torch.arange(which.start, which.stop)


def _delta_rule(module: Any, group: Group) -> StateCut:
    keys, values = module.num_k_heads, module.num_v_heads
    key_dim, value_dim = module.head_k_dim, module.head_v_dim
    own_keys, own_values = kv_part(keys, keys, group), part(values, group)
    key_rows = _numbers(kv_part(keys * key_dim, keys, group))
    value_part = part(values * value_dim, group)
    value_rows = _numbers(value_part)
    head_rows = _numbers(own_values)
    q, k, v = key_rows, keys * key_dim + key_rows, 2 * keys * key_dim + value_rows
    if hasattr(module, "in_proj_qkvz"):  # interleaved by heads of keys
        rows = {
            "in_proj_qkvz": _interleaved(module, own_keys, own_values, key_dim, value_dim),
            "in_proj_ba": _interleaved(module, own_keys, own_values, 0, 1),
        }
    elif hasattr(module, "in_proj_qkv"):
        rows = {"in_proj_qkv": torch.cat([q, k, v]), "in_proj_z": value_rows}
        rows |= {"in_proj_b": head_rows, "in_proj_a": head_rows}
    else:
        rows = {"q_proj": key_rows, "k_proj": key_rows, "v_proj": value_rows}
        rows |= {"g_proj": value_rows, "a_proj": head_rows, "b_proj": head_rows}
    num_keys, num_values = own_keys.stop - own_keys.start, len(head_rows)
    sizes = {"num_k_heads": num_keys, "num_v_heads": num_values}
    sizes |= {"key_dim": num_keys * key_dim, "value_dim": num_values * value_dim}
    sizes["conv_dim"] = 2 * sizes["key_dim"] + sizes["value_dim"]
    return StateCut(
        rows=rows,
        output="out_proj" if hasattr(module, "out_proj") else "o_proj",
        columns=value_part,
        convolution="conv1d",
        channels=torch.cat([q, k, v]),
        numbers={"A_log": own_values, "dt_bias": own_values},
        attributes=sizes,
    )


def _interleaved(
    module: Any, own_keys: slice, own_values: slice, key_dim: int, value_dim: int
) -> torch.Tensor:
    """Return the rows of a layer that has for each head of keys: q and k of `key_dim` each, then
    twice its heads of values of `value_dim` each (v and z, or b and a)."""
    each = module.num_v_heads // module.num_k_heads
    width = 2 * key_dim + 2 * each * value_dim
    rows = []
    for head in range(own_keys.start, own_keys.stop):
        rows.append(head * width + torch.arange(2 * key_dim))
        # Of a head that several ranks have, each has some heads of values.
        first = max(own_values.start - head * each, 0)
        last = min(own_values.stop - head * each, each)
        for half in range(2):
            begin = head * width + 2 * key_dim + half * each * value_dim
            rows.append(begin + torch.arange(first * value_dim, last * value_dim))
    return torch.cat(rows)


def _mamba2(module: Any, group: Group) -> StateCut:
    heads, groups, state = module.num_heads, module.n_groups, module.ssm_state_size
    inner = heads * module.head_dim
    own = part(inner, group)
    x, b = _numbers(own), _numbers(kv_part(groups * state, groups, group))
    c, own_heads = groups * state + b, part(heads, group)
    channels = torch.cat([x, inner + b, inner + c])
    conv_dim = inner + 2 * groups * state
    rows = torch.cat([x, inner + channels, inner + conv_dim + _numbers(own_heads)])
    own_groups = max(1, groups // group.size)
    sizes = {
        "num_heads": heads // group.size,
        "intermediate_size": inner // group.size,
        "n_groups": own_groups,
        "conv_dim": len(channels),
    }
    if hasattr(module, "groups_time_state_size"):
        sizes["groups_time_state_size"] = own_groups * state
    numbers: dict[str, slice | torch.Tensor] = dict.fromkeys(_PER_HEAD, own_heads)
    if hasattr(module, "mup_vector"):
        numbers["mup_vector"] = rows
    has_norm = hasattr(module, "norm") and any(True for _ in module.norm.parameters())
    return StateCut(
        rows={"in_proj": rows},
        output="out_proj",
        columns=own,
        convolution="conv1d",
        channels=channels,
        numbers=numbers,
        attributes=sizes,
        norm=("norm", groups) if has_norm else None,
    )


def _short_convolution(module: Any, group: Group) -> StateCut:
    channels = module.conv.out_channels
    own = part(channels, group)
    rows = _numbers(own)
    return StateCut(
        rows={"in_proj": torch.cat([rows + third * channels for third in range(3)])},
        output="out_proj",
        columns=own,
        convolution="conv",
        channels=rows,
        numbers={},
        attributes={},
    )


def _cut_convolution(convolution: Any, channels: torch.Tensor) -> None:
    """Leave some channels of a convolution whose channels are apart."""
    for name in ("weight", "bias"):
        if getattr(convolution, name) is not None:
            _cut_tensor(convolution, name, channels)
    convolution.in_channels = convolution.out_channels = convolution.groups = len(channels)


def _cut_tensor(module: nn.Module, name: str, which: slice | torch.Tensor) -> None:
    """Leave some numbers of a module's parameter, or along the last dimension of its buffer, in
    memory of their own."""
    buffers = dict(module.named_buffers(recurse=False))
    if name in buffers:
        setattr(module, name, buffers[name][..., which].clone())
        return
    kept = module.get_parameter(name).detach()[which].clone()
    setattr(module, name, nn.Parameter(kept, requires_grad=False))
