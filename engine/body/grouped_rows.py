"""Weights that stay in groups though they are of no linear layer: embeddings, and stacks of
experts.

They are read in parts, each of which is made dense when it is read. This is the reference, and what
the probe runs; a device's backend replaces them.
"""

from __future__ import annotations

import torch
from torch import nn

from .grouped_linear import GroupedWeight


class GroupedEmbedding(nn.Module):
    """An embedding `[num_embeddings, embedding_dim]` with a grouped weight: ids `[…]` → `[…,
    embedding_dim]`, times `embed_scale`."""

    def __init__(self, grouped: GroupedWeight, dtype: torch.dtype, embed_scale: float) -> None:
        """`dtype` is that of the model; `embed_scale` is 1 but for families whose embedding
        multiplies its rows."""
        super().__init__()
        self.grouped, self.dtype, self.embed_scale = grouped, dtype, embed_scale
        self.num_embeddings, self.embedding_dim = grouped.shape

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight."""
        return self.grouped.dense().to(self.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of the weight, not multiplied by `embed_scale`."""
        found = self.grouped.rows(ids.flatten()).dense().to(self.dtype)
        return found.view(*ids.shape, self.embedding_dim)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = self.rows(input)
        return rows if self.embed_scale == 1 else rows * self.embed_scale


class GroupedStack:
    """The weights of several experts `[experts, out_features, in_features]`, in place of a
    parameter: an expert's is made dense when it is asked for."""

    def __init__(self, grouped: GroupedWeight, num_experts: int, dtype: torch.dtype) -> None:
        """`grouped` has the rows of the first expert, then those of the next one."""
        self.grouped, self.dtype = grouped, dtype
        rows, columns = grouped.shape
        self.shape = torch.Size((num_experts, rows // num_experts, columns))

    @property
    def ndim(self) -> int:
        return 3

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        """Return the weight of one expert `[out_features, in_features]`."""
        begin = int(expert) * self.shape[1]
        return self.grouped.rows(slice(begin, begin + self.shape[1])).dense().to(self.dtype)


def is_read_by_rows(name: str, model: nn.Module) -> bool:
    """Whether a parameter of a transformers model is one that these classes can replace."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        return type(module) is nn.Embedding or hasattr(module, "embed_scale")
    is_expert = hasattr(module, "is_transposed") and getattr(module, attribute).ndim == 3
    return is_expert and not module.is_transposed


def stack_parts(parts: list[GroupedWeight], num_experts: int) -> GroupedWeight:
    """Return a weight that has, for each expert, its rows of the first part, then of the next:
    gate's and up's, as a file has them in two stacks."""
    if len(parts) == 1:
        return parts[0]

    def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
        stacks = [each.view(num_experts, -1, each.shape[1]) for each in tensors]
        return torch.cat(stacks, dim=1).flatten(0, 1)

    minimums = [each.minimum for each in parts if each.minimum is not None]
    return parts[0]._replace(
        quants=joined([each.quants for each in parts]),
        scale=joined([each.scale for each in parts]),
        minimum=joined(minimums) if minimums else None,
    )
