"""How a waiting sequence begins: what of it is cached already, and slots for its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..cache.block_manager import NO_MATCH, BlockManager
from ..outputs import BlockCopy
from ..sequence import Sequence


class Admitted(NamedTuple):
    """A sequence's first row: its tokens [num_matched, num_matched + num_new)."""

    num_matched: int
    num_new: int
    copies: list[BlockCopy]


class Admission:
    """Counts what it looks up, and what of it was found."""

    def __init__(self, block_manager: BlockManager, clock: Callable[[], float]) -> None:
        self._block_manager = block_manager
        self._clock = clock
        self.prefix_queries = 0
        self.prefix_hits = 0

    def admit(self, sequence: Sequence, budget: int) -> Admitted | None:
        """Match the prefix and take the first step's slots; None if the pool cannot give them.

        At least one token is left to compute, before the point where siblings wait to fork.
        """
        manager = self._block_manager
        target = sequence.fork_at if sequence.held_forks else len(sequence.token_ids)
        match = NO_MATCH
        if not sequence.needs_whole_prompt:
            match = manager.match_prefix(sequence, target - 1)
        num_new = min(target - match.num_tokens, budget)
        copies = manager.allocate_slots(sequence, num_new, match)
        if copies is None and match.successor is not None:
            match = match.whole_blocks()
            num_new = min(target - match.num_tokens, budget)
            copies = manager.allocate_slots(sequence, num_new, match)
        if copies is None:
            return None
        if sequence.num_cached_tokens is None:
            sequence.scheduled_time = self._clock()
            sequence.num_cached_tokens = match.num_tokens
            self.prefix_queries += sequence.num_prompt_tokens
            self.prefix_hits += match.num_tokens
        return Admitted(match.num_tokens, num_new, copies)
