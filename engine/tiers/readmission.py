"""Brings the blocks of waiting sequences back into the pool.

A sequence that may be admitted next has its blocks brought back first: free blocks of the pool are
taken for them, their loads become part of the step's plan, and they are indexed. So the sequence's
match finds them as it finds any cached block, and nothing after it knows that they were away.

A sequence that was preempted is one of these. Its full blocks stay in the pool's index; those that
the pool reuses meanwhile go to the tier, if their way there and back is faster than computing them
(preemption by swap); its last, partial block is computed anew.
"""

from __future__ import annotations

import enum
import time
from collections import abc

from ..cache.block_hashes import WantedBlock, is_first_group
from ..cache.block_manager import BlockManager
from ..sequence import Sequence
from .block_tier import BlockTier

MIN_WAIT, DEFAULT_WAIT = 0.2, 2.0
"""Seconds for which a sequence waits for the store below, at least, and if it is not known how long
computing its tokens would take; otherwise it waits as long as that."""


class Readiness(enum.Enum):
    """Whether a sequence may be admitted now, or not before a later step. Others may pass one that
    waits for the store below, which may take long."""

    READY = enum.auto()
    NEXT_STEP = enum.auto()
    WAITS_BELOW = enum.auto()


class _Wait:
    """What was tried for one waiting sequence, so that nothing is tried for ever."""

    __slots__ = ("asked", "brought", "until")

    def __init__(self) -> None:
        self.brought: set[bytes] = set()
        self.asked: set[bytes] = set()
        self.until: float | None = None


_NOTHING_TRIED = _Wait()
"""Stands for a sequence that has not waited yet; nobody changes it."""


class Readmission:
    """Asks a tier for blocks. All methods are the engine's thread's."""

    def __init__(
        self,
        manager: BlockManager,
        tier: BlockTier,
        clock: abc.Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = manager
        self._tier = tier
        self._clock = clock
        self._waits: dict[int, _Wait] = {}
        """By seq_id, for sequences that have waited for blocks."""

    def bring_back(self, sequence: Sequence, max_tokens: int, num_first: int) -> Readiness:
        """Bring blocks of a waiting sequence back into the pool, as far as they hold its first
        `max_tokens` tokens. `num_first` is the maximum number of tokens of its first row.

        What a step can bring is bounded, so that this may take several steps.
        """
        manager, pool, seq_id = self._manager, self._manager.pool, sequence.seq_id
        # 1. What a match takes, as far as the pool and host memory reach together.
        size = manager.block_size
        end = max_tokens // size
        reach, present, missing = self._find(sequence, end)
        # 2. Load as many as the step may still load, if there is room for all and for the
        #    sequence's first row: without it the sequence could not be admitted, and what was
        #    brought would only take others' place.
        now: list[WantedBlock] = []
        for one in reversed(missing):  # what a later step loads must not give way until then
            self._tier.host.use(one.own_hash)
        if missing:
            first_row = -(-min(max_tokens + 1 - reach * size, num_first) // size)
            needed = len(missing) + manager.num_groups * first_row
            needed += sum(pool.ref_counts[block] == 0 for block in present)
            if needed <= pool.num_free:
                now = missing[: max(self._tier.num_loads_left, 0)]
        if now:
            self._load(sequence, present, now)
        # 3. From there on, fetch what the store below has; other sequences may go on meanwhile.
        waits_below = reach < end and self._ask_below(sequence, reach, end)
        if not waits_below and len(now) == len(missing):
            self._waits.pop(seq_id, None)
            return Readiness.READY
        known = self._waits.setdefault(seq_id, _Wait())
        known.brought.update(one.own_hash for one in now)
        return Readiness.WAITS_BELOW if waits_below else Readiness.NEXT_STEP

    def _find(self, sequence: Sequence, end: int) -> tuple[int, list[int], list[WantedBlock]]:
        """Return how many whole blocks a match would have, at most `end`, if host memory's were in
        the pool; and those of its blocks that the pool has, and those that only host memory has."""
        brought = self._waits.get(sequence.seq_id, _NOTHING_TRIED).brought
        lookup, host = self._manager.pool.lookup, self._tier.host
        pays = self._tier.cost.copy_pays

        def has(own_hash: bytes) -> bool:
            if lookup(own_hash) is not None:
                return True
            return pays and own_hash in host and own_hash not in brought

        reach = self._manager.find_end(sequence, end, has)
        present: list[int] = []
        missing: list[WantedBlock] = []
        for one in self._manager.wanted_blocks(sequence, reach):
            block = lookup(one.own_hash)
            if block is None:
                missing.append(one)
            else:
                present.append(block)
        return reach, present, missing

    def _load(self, sequence: Sequence, present: list[int], missing: list[WantedBlock]) -> None:
        """Take blocks of the pool for those that are missing, plan their loads and index them."""
        pool, size, request = self._manager.pool, self._manager.block_size, sequence.request
        recorder = pool.index.recorder
        for block in present:  # none of these may be taken for them
            pool.share(block)

        def allocate() -> int:
            block = pool.allocate()
            assert block is not None
            return block

        fresh = self._tier.plan_loads([one.own_hash for one in missing], allocate)
        for one, block in zip(missing, fresh, strict=True):
            tokens = sequence.token_ids[one.place * size : (one.place + 1) * size]
            pool.index.add_full(block, one.parent, one.own_hash, tokens)
            if recorder is not None and is_first_group(one.own_hash):
                # An earlier process may have stored it, unknown to others.
                before = one.parent if one.place else None
                recorder.stored(one.own_hash, before, tokens, request.adapter, request.cache_salt)
        # From here on they are cached blocks, the last ones to be reused.
        for block in reversed(present + fresh):
            pool.release(block)

    def _ask_below(self, sequence: Sequence, start: int, end: int) -> bool:
        """Ask the store below for blocks of a sequence from `start` on, and return whether the
        sequence should wait for any."""
        tier, lower, now = self._tier, self._tier.lower, self._clock()
        known = self._waits.get(sequence.seq_id, _NOTHING_TRIED)
        if lower is None or (known.until is not None and now >= known.until):
            return False
        # 1. Which blocks are missing, if the store's are counted too.
        end, missing = self._find_below(sequence, start, min(end, start + tier.max_fetches))
        coming = any(tier.is_coming(one.own_hash) for one in missing)
        if not missing or not (coming or tier.cost.load_pays()):
            return False
        # 2. Fetch them, but none twice: one that was fetched and is not here any more had to give
        #    way, and would again.
        waits = False
        for one in missing:
            if not tier.is_coming(one.own_hash):
                if one.own_hash in known.asked:
                    break
                if known is _NOTHING_TRIED:
                    known = self._waits[sequence.seq_id] = _Wait()
                waits = True
                if not tier.fetch(one.own_hash):
                    break  # it waits for a slot
                known.asked.add(one.own_hash)
            waits = True
        # 3. Wait no longer than computing them would take.
        if waits and known is _NOTHING_TRIED:
            known = self._waits[sequence.seq_id] = _Wait()
        if waits and known.until is None:
            computed = tier.cost.compute_seconds(end - start)
            known.until = now + (max(computed, MIN_WAIT) if computed else DEFAULT_WAIT)
        return waits

    def _find_below(
        self, sequence: Sequence, start: int, end: int
    ) -> tuple[int, list[WantedBlock]]:
        """Return how many whole blocks a match would have, at most `end`, if the store's were in
        the pool, too; and those of its blocks that only the store has: none if these are no more
        than the `start` blocks that it would have without them."""
        manager, tier, lower = self._manager, self._tier, self._tier.lower
        assert lower is not None
        lookup, host = manager.pool.lookup, tier.host

        def is_near(own_hash: bytes) -> bool:
            return own_hash in host or lookup(own_hash) is not None

        # 1. Ask for all of them at once. What a longer match takes before `start` is near.
        columns = [manager.column(sequence, i) for i in range(start, end)]
        far = [one.own_hash for column in columns for one in column if not is_near(one.own_hash)]
        known = {own_hash for own_hash in far if tier.is_coming(own_hash)}
        known.update(lower.find([own_hash for own_hash in far if own_hash not in known]))
        # 2. How far they reach, with no more blocks to fetch than host memory takes at a time.
        while True:
            end = manager.find_end(sequence, end, lambda own: own in known or is_near(own))
            if end <= start:
                return start, []
            wanted = manager.wanted_blocks(sequence, end)
            missing = [one for one in wanted if not is_near(one.own_hash)]
            if len(missing) <= tier.max_fetches:
                return end, missing
            end -= len(missing) - tier.max_fetches

    def forget(self, sequence: Sequence) -> None:
        """Note that a sequence has ended."""
        self._waits.pop(sequence.seq_id, None)
