"""Embeddings on the CPU whose weights stay in groups: panels of integers, of which a lookup reads
some columns. A tied head multiplies by the same panels.

Importing this loads Numba.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import nn

from ....kernels.cpu.arrays import as_array, thread_count
from ....kernels.cpu.integer.products import IntegerWeight
from ....kernels.cpu.norms import FEW
from ....kernels.cpu.region import run_calls
from ...body.grouped_rows import GroupedEmbedding
from .packing import emptied, pack_weight, unpack

_NO_NORM = (np.zeros((0, 0), np.float32), np.zeros(0, np.float32))


class PackedEmbedding(nn.Module):
    """Stands in for a GroupedEmbedding."""

    def __init__(self, embedding: GroupedEmbedding) -> None:
        """Take over the weight of `embedding`, which is emptied."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.grouped.shape
        self.dtype, self.embed_scale = embedding.dtype, embedding.embed_scale
        self.source = embedding.grouped.quants
        """The integers that were packed, by which a tied head is known; emptied by `release`."""
        packed = pack_weight(embedding.grouped, None)
        assert isinstance(
            packed, IntegerWeight
        )  # groups of other sizes are in no file that is kept
        self.packed = packed
        embedding.grouped = emptied(embedding.grouped)

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight."""
        return unpack(self.packed, self.num_embeddings, self.embedding_dim).to(self.dtype)

    def release(self) -> None:
        """Forget the integers that were packed."""
        self.source = self.source.new_empty(0)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        ids = as_array(input.reshape(-1))
        rows = np.empty((len(ids), self.embedding_dim), np.float32)
        call = self.packed.fetch(ids, rows, np.float32(self.embed_scale), _NO_NORM, rows)
        num_threads = thread_count()
        numba.set_num_threads(num_threads)
        run_calls([(call, -(-len(ids) // FEW))], len(ids), num_threads)
        return torch.from_numpy(rows).to(self.dtype).view(*input.shape, self.embedding_dim)


def pack_embeddings(model: nn.Module) -> dict[nn.Module, PackedEmbedding]:
    """Replace every GroupedEmbedding below `model`. Returns those that were made of each."""
    made: dict[nn.Module, PackedEmbedding] = {}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GroupedEmbedding):
                if child not in made:
                    made[child] = PackedEmbedding(child)
                setattr(module, name, made[child])
    return made
