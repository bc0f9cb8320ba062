"""An adapter's weights, and the linear layers of a model that can be adapted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import nn


class LinearShape(NamedTuple):
    """A linear layer's features."""

    in_features: int
    out_features: int


class LoraWeight(NamedTuple):
    """What an adapter adds to one linear layer: y += B A x.

    `a` is `[rank, in_features]`; `b`, `[out_features, rank]`, has been scaled. Both are float32 and
    on the host.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return len(self.a)


def version_of(weights: Mapping[str, LoraWeight]) -> str:
    """Return a hash of all that an adapter computes, as 32 hexadecimal digits. It is the same on
    all machines, so what was computed with one version can be told from what was computed with
    another, here and there."""
    digest = sha256()
    for name, (a, b) in sorted(weights.items()):
        digest.update(f"{name}\0{tuple(a.shape)}\0{tuple(b.shape)}\0".encode())
        for half in (a, b):
            digest.update(half.contiguous().numpy().data)
    return digest.hexdigest()[:32]


class Adapter(NamedTuple):
    """The weights of an adapter, by the names of the linear layers in the model, and a hash of
    them."""

    weights: dict[str, LoraWeight]
    version: str = ""

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(weight.rank for weight in self.weights.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory that it takes."""
        return sum(weight.a.nbytes + weight.b.nbytes for weight in self.weights.values())


class Place(NamedTuple):
    """A linear layer in a model: the attribute `attribute` of `parent`."""

    parent: nn.Module
    attribute: str
    linear: nn.Module

    @property
    def shape(self) -> LinearShape:
        in_features, out_features = self.linear.in_features, self.linear.out_features
        assert isinstance(in_features, int) and isinstance(out_features, int)
        return LinearShape(in_features, out_features)


def find_linears(
    body: nn.Module, prefix: str, run: Callable[[], object], num_tokens: int
) -> dict[str, Place]:
    """Return the linear layers of a body that can be adapted, by their names in the whole model,
    which begin with `prefix`.

    `run` runs the body on `num_tokens` tokens: a layer qualifies if it is called once, with all of
    them. (An expert gets only some tokens, and would not know whose they are.)
    """
    places = dict(_linears_below(body, f"{prefix}."))
    calls: dict[nn.Module, list[int]] = {}

    def watch(linear: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        rows = arguments[0].numel() // arguments[0].shape[-1] if arguments else 0
        calls.setdefault(linear, []).append(rows)

    hooks = [place.linear.register_forward_pre_hook(watch) for place in places.values()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: place for name, place in places.items() if calls.get(place.linear) == [num_tokens]
    }


def linear_shapes(body: nn.Module, prefix: str) -> dict[str, LinearShape]:
    """Return the shapes of all linear layers of a body, by their names in the whole model, which
    begin with `prefix`."""
    return {name: place.shape for name, place in _linears_below(body, f"{prefix}.")}


def _linears_below(module: nn.Module, prefix: str) -> Iterator[tuple[str, Place]]:
    """Yield the linear layers below a module, but nothing that is part of one."""
    for name, child in module.named_children():
        if isinstance(getattr(child, "in_features", None), int):
            yield prefix + name, Place(module, name, child)
        else:
            yield from _linears_below(child, f"{prefix}{name}.")
