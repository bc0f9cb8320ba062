"""How a waiting sequence begins: its cached prefix, and slots for its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..cache.block_manager import NO_MATCH, BlockManager
from ..sequence import Sequence
from ..step import BlockCopy


class Admitted(NamedTuple):
    """A sequence's first row, which computes its tokens [num_matched, num_matched + num_new)."""

    num_matched: int
    num_new: int
    copies: list[BlockCopy]


class Admission:
    """Decides whether a waiting sequence fits, and counts prefix-cache queries and hits."""

    def __init__(self, block_manager: BlockManager, clock: Callable[[], float]) -> None:
        self._block_manager = block_manager
        self._clock = clock
        self.prefix_queries = 0
        self.prefix_hits = 0

    def target(self, sequence: Sequence) -> int:
        """Return how many tokens a sequence's first rows may reach."""
        return sequence.fork_at if sequence.held_forks else len(sequence.token_ids)

    def admit(self, sequence: Sequence, budget: int) -> Admitted | None:
        """Match the prefix and take the first step's slots; None if the pool cannot give them.

        At least one token is left to compute, before the point where siblings wait to fork.
        """
        # 1. How many tokens the first row may reach, and how many of them are cached.
        manager = self._block_manager
        target = self.target(sequence)
        match = NO_MATCH
        if not sequence.needs_whole_prompt:
            match = manager.match_prefix(sequence, target - 1)
        # 2. Slots. A match that ends within a block needs one more block for its copy while the
        #    step lasts, so if the pool is short, try again without it.
        num_new = min(target - match.num_tokens, budget)
        copies = manager.allocate_slots(sequence, num_new, match)
        if copies is None and match.successor is not None:
            match = match.whole_blocks()
            num_new = min(target - match.num_tokens, budget)
            copies = manager.allocate_slots(sequence, num_new, match)
        if copies is None:
            return None
        # 3. Statistics of first admissions only: a recompute finds what the sequence itself left.
        if sequence.num_cached_tokens is None:
            sequence.scheduled_time = self._clock()
            # A request that is resumed may find tokens of its output, too.
            sequence.num_cached_tokens = min(match.num_tokens, sequence.num_prompt_tokens)
            self.prefix_queries += sequence.num_prompt_tokens
            self.prefix_hits += sequence.num_cached_tokens
        return Admitted(match.num_tokens, num_new, copies)
