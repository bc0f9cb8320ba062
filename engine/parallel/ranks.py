"""The ranks that run one model, as each of them sees the others."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch.distributed as dist

from ..config import EngineConfig
from ..errors import ModelLoadError
from .group import SOLO, DistributedGroup, DistributedRing, Group, Ring

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from ..adapters.adapter import Adapter
    from ..devices.backend import Backend
    from .step_plan import StepPlan

COLLECTIVE_TIMEOUT_SECONDS = 100.0
"""A collective that takes longer ends its process. It is below the server's default of
`--engine-stall-timeout`, so that the log names the collective that was waited for."""


class Ranks(Protocol):
    """This rank's place among all ranks, and its ways to the others."""

    rank: int
    size: int
    """The number of ranks."""
    group: Group
    """The ranks that share this one's layers."""
    ring: Ring | None
    """The other stages of the pipeline, if there are any."""

    def meet(self, backend: Backend) -> None:
        """Wait until every rank has loaded its weights, and enable the collectives of `group` and
        `ring`. Raises the StartupError of a rank that failed."""

    def agree(self, values: list[int]) -> list[list[int]]:
        """Return what each rank says, by rank. Raises the StartupError of a rank that failed."""

    def send(self, plan: StepPlan) -> None:
        """Send a plan to all other ranks. Called by rank 0 only."""

    def send_adapter(self, adapter_id: int, adapter: Adapter) -> None:
        """Send a whole LoRA adapter to all other ranks. Called by rank 0 only, once they carry out
        its orders."""

    def drop_adapter(self, adapter_id: int) -> None:
        """Let all other ranks forget an adapter. Called by rank 0 only."""

    def hold_blocks(self, num_slots: int) -> None:
        """Let all other ranks take host memory for so many blocks, after which all ranks `agree`
        once more. Called by rank 0 only."""

    def close(self) -> None:
        """Let the other ranks end. Called by rank 0 only."""


class Alone:
    """The Ranks of a model that one process runs."""

    rank = 0
    size = 1
    group: Group = SOLO
    ring: Ring | None = None

    def meet(self, backend: Backend) -> None:
        """Return at once."""

    def agree(self, values: list[int]) -> list[list[int]]:
        return [values]

    def send(self, plan: StepPlan) -> None:
        raise AssertionError("there is nobody to send a plan to")

    def send_adapter(self, adapter_id: int, adapter: Adapter) -> None:
        """Do nothing."""

    def drop_adapter(self, adapter_id: int) -> None:
        """Do nothing."""

    def hold_blocks(self, num_slots: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


ALONE = Alone()


def check_alike(ranks: Ranks, what: str, values: list[int]) -> None:
    """Raise ModelLoadError if the ranks' `values`, which `what` names, are not the same."""
    found = ranks.agree(values)
    if any(other != found[0] for other in found):
        raise ModelLoadError(f"the ranks differ in {what}: {found}")


class Collectives:
    """The group and the ring of one rank over torch.distributed."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        size, stages = config.tensor_parallel_size, config.pipeline_parallel_size
        self._is_local = config.nnodes == 1
        self._rank, self._size, self._stages = rank, size, stages
        self._made_group = DistributedGroup(rank % size, size)
        self._made_ring = DistributedRing(rank // size, stages)
        self.group: Group = self._made_group if size > 1 else SOLO
        self.ring: Ring | None = self._made_ring if stages > 1 else None

    def join(self, store: Store, backend: Backend) -> None:
        """Meet all ranks in `store`."""
        is_gpu = backend.collectives == "nccl"
        if self._is_local and sys.platform == "linux":
            os.environ.setdefault(
                "GLOO_SOCKET_IFNAME", "lo"
            )  # its ports are nobody else's business
        dist.init_process_group(
            backend.collectives,
            store=store,
            rank=self._rank,
            world_size=self._size * self._stages,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
            device_id=backend.device if is_gpu else None,
        )
        # Every rank takes part in making every group.
        for stage in range(self._stages if self._size > 1 else 0):
            ranks = list(range(stage * self._size, (stage + 1) * self._size))
            made = dist.new_group(ranks)
            if self._rank in ranks:
                self._made_group.join(made)
        for part in range(self._size if self._stages > 1 else 0):
            ranks = list(range(part, self._size * self._stages, self._size))
            made = dist.new_group(ranks)
            if self._rank in ranks:
                self._made_ring.join(made)
