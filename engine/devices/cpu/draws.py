"""DrawOps on the CPU, compiled by Numba and vectorised by NumPy.

Importing this loads Numba.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels.cpu import sampling as cpu_sampling
from ...sampling.draws import TorchDraws
from ...sampling.plan import DrawGroup

_DRAW_ELEMENTS = 1 << 16
"""Logits drawn from at a time in torch: they stay in the cache."""


class CpuDraws(TorchDraws):
    """TorchDraws with the races in Numba. A draw from the whole vocabulary needs torch no more."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size, torch.device("cpu"), _DRAW_ELEMENTS)

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # NumPy's argmax is vectorised, torch's on the CPU is not: 15 times at 32,000 tokens.
        token_ids = torch.from_numpy(x.to(torch.float32).numpy().argmax(axis=1))
        return x.gather(1, token_ids.unsqueeze(1)).squeeze(1), token_ids

    def race(self, relative: Tensor, keys: Tensor, token_ids: Tensor) -> Tensor:
        winners = torch.empty(len(relative), dtype=torch.int64)
        ids = token_ids.view(-1, relative.shape[1])
        cpu_sampling.race(relative.numpy(), keys.numpy(), ids.numpy(), winners.numpy())
        return winners

    def draw(self, x: Tensor, best: Tensor, group: DrawGroup, positions: Tensor) -> Tensor:
        if group.is_filtered:
            return super().draw(x, best, group, positions)
        winners = torch.empty(len(group.seeds), dtype=torch.int64)
        cpu_sampling.draw(
            x.to(torch.float32).numpy(),
            group.working_rows.numpy(),
            best.to(torch.float32).numpy(),
            group.temperature.numpy(),
            group.seeds.numpy(),
            positions.numpy(),
            group.batch_rows.numpy(),
            self._token_ids[None].numpy(),
            winners.numpy(),
        )
        return winners
