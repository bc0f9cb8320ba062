"""DrawOps on CUDA: one kernel launch or two for a group of rows, whatever filters it has.

Importing this loads Triton.
"""

from __future__ import annotations

from torch import Tensor

from ....kernels.cuda.sampling.sample_tokens import sample_tokens
from ...sampling.plan import DrawGroup


class CudaDraws:
    """DrawOps that draw the same tokens as TorchDraws."""

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.max(dim=1)

    def draw(self, x: Tensor, best: Tensor, group: DrawGroup, positions: Tensor) -> Tensor:
        return sample_tokens(
            x,
            best,
            rows=group.working_rows,
            seeds=group.seeds,
            positions=positions.index_select(0, group.batch_rows),
            temperature=group.temperature,
            top_k=group.top_k,
            top_p=group.top_p,
            log_min_p=group.log_min_p,
        )
