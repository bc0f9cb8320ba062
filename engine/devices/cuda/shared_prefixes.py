"""Prefixes that the rows of a decode batch share, which attention reads once for all of them.

Importing this loads Triton.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from ....kernels.cuda.attention.cascade import CascadeWorkspace
from ....kernels.cuda.attention.decode_schedule import DecodeWorkspace
from ....kernels.prefix_groups import PrefixGroup, find_prefix_groups
from ...layers.attention_shape import AttentionShape

logger = logging.getLogger("quire.engine")

FindGroups = Callable[..., list[PrefixGroup]]
"""Has the signature of `find_prefix_groups`."""


class SharedPrefixes:
    """Decides in each step which rows have their common beginning read once.

    It looks only at the block tables: rows share a prefix if their first blocks are the same,
    whatever made the scheduler share them (the prefix cache, a fork, a beam).
    """

    def __init__(
        self,
        workspace: CascadeWorkspace,
        block_size: int,
        find_groups: FindGroups = find_prefix_groups,
    ) -> None:
        self.workspace = workspace
        self._block_size = block_size
        self._find_groups = find_groups
        self._groups: list[PrefixGroup] = []

    @classmethod
    def allocate(
        cls,
        workspaces: Mapping[AttentionShape, DecodeWorkspace],
        block_size: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        find_groups: FindGroups = find_prefix_groups,
    ) -> SharedPrefixes | None:
        """Allocate the workspace; None if every layer has a window, if those without one attend
        in several shapes, or if the heads of one sequence do not fit a tile."""
        full = [workspace for shape, workspace in workspaces.items() if shape.window is None]
        if len(full) != 1:
            return None
        try:
            workspace = CascadeWorkspace.allocate(full[0], dtype=dtype, cache_dtype=cache_dtype)
        except ValueError as error:
            logger.info("decode steps read shared prefixes row by row: %s", error)
            return None
        return cls(workspace, block_size, find_groups)

    def find(self, tables: Sequence[Sequence[int]], seq_lens: Sequence[int]) -> bool:
        """Have the workspace serve the groups of these decode rows, given by their block tables
        and lengths. False if reading prefixes once saves less than its launch costs."""
        workspace = self.workspace
        groups = self._find_groups(
            tables, seq_lens, self._block_size, workspace.cost, tile=workspace.tile
        )
        if not groups:
            return False
        if groups != self._groups:
            workspace.set_groups(groups)
            self._groups = groups
        return True
