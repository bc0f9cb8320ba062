"""Collectives among the ranks that share each layer."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist


class Group(Protocol):
    """Ranks that call the same collectives in the same order, with tensors of the same shapes.

    `rank` counts from 0 to `size` - 1 within the group.
    """

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' x; x may be overwritten. Every rank gets the same bits."""

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        """x `[R, n]` → `[R, size * n]`, the columns of all ranks in their order."""

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite x by that of rank 0, and return it."""


class Solo:
    """A group of one: every collective is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x


SOLO = Solo()


class DistributedGroup:
    """A group over torch.distributed: NCCL on CUDA, gloo otherwise. Its process group comes with
    `join`, since layers are cut for a group before its ranks meet."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._process_group: dist.ProcessGroup | None = None

    def join(self, process_group: dist.ProcessGroup) -> None:
        """Use a process group of as many ranks."""
        self._process_group = process_group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=self._process_group)
        return x

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = x.shape
        parts = x.new_empty(self.size * rows, columns)
        dist.all_gather_single(parts, x.contiguous(), group=self._process_group)
        return parts.view(self.size, rows, columns).transpose(0, 1).reshape(rows, -1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        dist.broadcast(x, group=self._process_group, group_src=0)
        return x


class Ring(Protocol):
    """The same part of all stages of a pipeline. The residual stream passes from each to the next,
    and from the last back to the first."""

    stage: int
    size: int

    def send(self, x: torch.Tensor) -> None:
        """Send x to the next stage, or from the last to the first."""

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite x by what the stage before sends, and return it."""


class DistributedRing:
    """A ring over torch.distributed."""

    def __init__(self, stage: int, size: int) -> None:
        self.stage = stage
        self.size = size
        self._process_group: dist.ProcessGroup | None = None

    def join(self, process_group: dist.ProcessGroup) -> None:
        """Use a process group of as many ranks, one of each stage."""
        self._process_group = process_group

    def send(self, x: torch.Tensor) -> None:
        to = (self.stage + 1) % self.size
        dist.send(x.contiguous(), group=self._process_group, group_dst=to)

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        dist.recv(x, group=self._process_group, group_src=(self.stage - 1) % self.size)
        return x
