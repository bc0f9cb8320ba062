"""Evicted blocks in host memory and below it, as the scheduler uses them.

    the pool reuses a cached block ─▶ take ─▶ a save in the step's plan ─▶ a slot of host memory
                                                                              │ least recently used
                         block of the pool ◀─ a load in a plan ◀─ slot ◀──────┤
                                                                   ▲          ▼
                                                          verified └──── the store below

readmission.py decides what comes back, and when.
"""

from __future__ import annotations

import time
from collections import abc
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple

from ..cache.block_hashes import is_first_group
from ..cache.block_manager import BlockManager
from ..outputs import TierStats
from ..step import BlockLoad, BlockSave, SchedulerOutput
from .host_store import HostStore
from .lower_tier import LowerTier
from .transfer_cost import TransferCost

LOAD_SECONDS = 0.05
"""Time that loads may add to one step, for which all running sequences wait."""
MAX_LOADS = 4096
"""Blocks that a step may load, however fast that is."""
_CLEAN_SHARE, _MAX_CLEAN = 4, 1024
"""At least one slot of so many, and no more than so many slots, are free or have content that the
store below has as well: so many blocks can be evicted at once without a loss."""
_BURSTS = 2
"""Steps that can evict as many blocks as any did lately: one that the device may not have ended, so
that its blocks cannot be written yet, and the next."""
_BURST_MEMORY = 0.9
"""Weight of the largest number of evicted blocks after another step that evicts some."""
CLOSE_SECONDS = 1.5
"""Time that writes get when the engine ends."""


class _Fetch(NamedTuple):
    """A block on its way from the store below into a slot. If it is not `wanted` any more, it is
    dropped when it arrives."""

    slot: int
    result: Future[float | None]
    wanted: bool = True


class BlockTier:
    """Implements EvictedBlocks. All methods are the engine's thread's."""

    def __init__(
        self,
        manager: BlockManager,
        host: HostStore,
        cost: TransferCost,
        block_bytes: int,
        lower: LowerTier | None = None,
        *,
        copies_ended: abc.Callable[[], int],
        clock: abc.Callable[[], float] = time.monotonic,
    ) -> None:
        """`copies_ended` is that of the worker (see WorkerProtocol)."""
        self._manager = manager
        self.host = host
        self.lower = lower
        self.cost = cost
        self._block_bytes = block_bytes
        self._copies_ended = copies_ended
        self._clock = clock
        self._step = 0
        self._saves: dict[bytes, BlockSave] = {}
        """Those of the step that is being planned, by hash, in order."""
        self._loads: list[BlockLoad] = []
        self._loading: set[int] = set()
        """Slots from which the step that is being planned loads."""
        self._dirty: set[bytes] = set()
        """Blocks in host memory that the store below must still get, if there is one."""
        self._burst = 0.0
        """The largest number of blocks that a step has evicted, lately."""
        self._may_be_dirty = False
        """Whether one of the least recently used blocks may have to be written ahead."""
        self._fetches: dict[bytes, _Fetch] = {}
        self._planned: dict[int, float] = {}
        """When each step in flight was planned."""
        self._last_results = 0.0
        self._saved = self._loaded = self._dropped = 0
        self._written = self._read = 0
        manager.pool.evicted_blocks = self
        manager.pool.index.is_kept = self.holds

    # -- EvictedBlocks ---------------------------------------------------------------------

    def take(self, block: int, own_hash: bytes | None) -> None:
        if own_hash is None:
            return
        if own_hash in self.host:
            self._touch(own_hash)
            return
        slot = None
        if self.cost.copy_pays:
            slot = self._free_slot()
            if slot is None:
                slot = self._cancel_save()
        if slot is None:
            self._dropped += 1
            return
        self._put(own_hash, slot, self._step)
        self._saves[own_hash] = BlockSave(block, slot)
        self._saved += 1

    def holds(self, own_hash: bytes) -> bool:
        if own_hash in self.host:
            return True
        return self.lower is not None and own_hash in self.lower.hashes()

    def hashes(self) -> abc.Set[bytes]:
        found = set(self.host.hashes())
        return found if self.lower is None else found | self.lower.hashes()

    def discard(self, hashes: abc.Iterable[bytes]) -> None:
        for own_hash in hashes:
            was_held = self.holds(own_hash)
            self.host.discard(own_hash)
            self._dirty.discard(own_hash)
            self._give_up_fetch(own_hash)
            if self.lower is not None:
                self.lower.discard(own_hash)
            if was_held:
                self._removed(own_hash)

    # -- steps -----------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Begin to plan a step: blocks that are taken and brought back from now on belong to it."""
        self._step = step
        self._planned[step] = self._clock()
        self.poll()

    def complete(self, plan: SchedulerOutput) -> SchedulerOutput:
        """Return the planned step with its copies from and to host memory."""
        if not (self._saves or self._loads):
            return plan
        if self._saves:
            self._burst = max(len(self._saves), self._burst * _BURST_MEMORY)
        saves, loads, self._saves, self._loads = self._saves, self._loads, {}, []
        self._loading.clear()
        return plan._replace(block_saves=list(saves.values()), block_loads=loads)

    def end_step(self, plan: SchedulerOutput) -> None:
        """Learn from the time of a step whose results have arrived."""
        now = self._clock()
        begin = max(self._planned.pop(plan.step, now), self._last_results)
        self._last_results = now
        self._planned = {step: at for step, at in self._planned.items() if step > plan.step}
        if len(plan.token_ids) > 2 * len(plan.seq_ids):  # it is the tokens of prompts that count
            copies = len(plan.block_saves) + len(plan.block_loads)
            copied = copies * self.cost.copy_seconds
            self.cost.observe_step(len(plan.token_ids), now - begin - copied)

    def poll(self) -> None:
        """Take in what the threads have done, and give the store below what it should write."""
        self.host.ended = self._copies_ended()
        lower = self.lower
        if lower is None:
            return
        for own_hash, fetch in [item for item in self._fetches.items() if item[1].result.done()]:
            del self._fetches[own_hash]
            seconds = fetch.result.result()
            if not fetch.wanted:
                self.host.give_back(fetch.slot)
                continue
            lower.loaded(own_hash, ok=seconds is not None)
            if seconds is not None:
                self.cost.observe_load(seconds)
                self._read += 1
            if seconds is None or own_hash in self.host:
                self.host.give_back(fetch.slot)
            else:
                self.host.put(own_hash, fetch.slot)
        for written in lower.take_written():
            self.host.let_go(written.slot)
            self._written += written.kept
            for lost in written.lost:
                if lost not in self.host:
                    self._removed(lost)
        if self._may_be_dirty:
            self._may_be_dirty = False
            for own_hash in self.host.oldest(self._num_clean() - self.host.num_free):
                if own_hash in self._dirty and not (lower.can_write and self._write(own_hash)):
                    self._may_be_dirty = True
                    break

    def _num_clean(self) -> int:
        """Return how many slots should be free, or have content that the store below has too."""
        slots = self.host.num_slots
        wanted = max(-(-slots // _CLEAN_SHARE), int(_BURSTS * self._burst))
        return min(wanted, slots, _MAX_CLEAN)

    def _write(self, own_hash: bytes) -> bool:
        """Give a dirty block to the store below; return False if its save belongs to a step that
        has not ended."""
        slot = self.host.hold(own_hash)
        if slot is None or self.lower is None:
            return False
        self._dirty.remove(own_hash)
        self.lower.store(own_hash, slot, self.host.view(slot))
        return True

    # -- slots -----------------------------------------------------------------------------

    def _free_slot(self) -> int | None:
        """Take a slot, giving up the least recently used block if there is no other."""
        reserved = self.host.reserve(keep=self._dirty)
        if reserved is None:
            return None
        slot, lost = reserved
        if lost is not None:
            self._lose(lost)
        return slot

    def _lose(self, own_hash: bytes) -> None:
        """Note that host memory has given up a block."""
        self._dirty.discard(own_hash)
        if not self.holds(own_hash):
            self._dropped += 1
            self._removed(own_hash)

    def _cancel_save(self) -> int | None:
        """Give up the first of this step's saves for a later one, and return its slot. The blocks
        of a chain are evicted from its end, and the later ones are found without the earlier."""
        for own_hash, save in self._saves.items():
            if save.slot not in self._loading:
                del self._saves[own_hash]
                self.host.take_out(own_hash)
                self._saved -= 1
                self._lose(own_hash)
                return save.slot
        return None

    def _put(self, own_hash: bytes, slot: int, step: int) -> None:
        """Let a slot hold a block that the device saves in this step."""
        self.host.put(own_hash, slot, step)
        lower = self.lower
        if lower is None:
            return
        if lower.find([own_hash]):
            lower.remember(own_hash)
        else:
            self._dirty.add(own_hash)
            self._may_be_dirty = True

    def _touch(self, own_hash: bytes, step: int | None = None) -> int:
        self._may_be_dirty = True  # others have become older
        return self.host.use(own_hash, step)

    def _removed(self, own_hash: bytes) -> None:
        """Tell whoever follows the blocks of the first group that one is gone, unless the pool
        still has it."""
        index, recorder = self._manager.pool.index, self._manager.pool.index.recorder
        if recorder is not None and is_first_group(own_hash) and index.lookup(own_hash) is None:
            recorder.removed(own_hash)

    # -- loads -----------------------------------------------------------------------------

    @property
    def num_loads_left(self) -> int:
        """How many blocks the step that is being planned may still load."""
        fast_enough = int(LOAD_SECONDS / max(self.cost.copy_seconds, 1e-9))
        return max(1, min(MAX_LOADS, fast_enough)) - len(self._loads)

    def plan_loads(self, hashes: list[bytes], allocate: abc.Callable[[], int]) -> list[int]:
        """Plan the loads of blocks that are in host memory into blocks of the pool, which are
        returned."""
        slots = [self._touch(own_hash, self._step) for own_hash in hashes]
        self._loading.update(slots)  # the next line may want their slots for other blocks
        blocks = [allocate() for _ in slots]
        self._loads += map(BlockLoad, slots, blocks)
        self._loaded += len(blocks)
        return blocks

    @property
    def max_fetches(self) -> int:
        """How many blocks may come from the store below at a time."""
        return max(self.host.num_slots // 2, 1)

    def is_coming(self, own_hash: bytes) -> bool:
        """Return whether a block is on its way from the store below."""
        return own_hash in self._fetches

    def fetch(self, own_hash: bytes) -> bool:
        """Begin to fetch a block from the store below; return False if no slot is free for it."""
        assert self.lower is not None
        slot = self._free_slot() if len(self._fetches) < self.max_fetches else None
        if slot is None:
            return False
        self._fetches[own_hash] = _Fetch(slot, self.lower.load(own_hash, self.host.view(slot)))
        return True

    def _give_up_fetch(self, own_hash: bytes) -> None:
        fetch = self._fetches.get(own_hash)
        if fetch is not None:
            self._fetches[own_hash] = fetch._replace(wanted=False)

    def wait(self, timeout: float) -> None:
        """Wait until a block has come from the store below, if any is on its way, at most
        `timeout` seconds."""
        if self._fetches:
            results = [fetch.result for fetch in self._fetches.values()]
            wait(results, timeout, return_when=FIRST_COMPLETED)

    # -- all at once -----------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all blocks. What is on its way is not found either."""
        held = self.hashes()
        for own_hash in self.host.hashes():
            self.host.discard(own_hash)
        self._dirty.clear()
        for own_hash in list(self._fetches):
            self._give_up_fetch(own_hash)
        if self.lower is not None:
            self.lower.clear()
        for own_hash in held:
            self._removed(own_hash)

    def close(self) -> None:
        """Give the store below what only host memory has, the most recently used first, as far as
        the time reaches, and close it."""
        lower = self.lower
        if lower is None:
            return
        until = time.monotonic() + CLOSE_SECONDS
        self.poll()
        for own_hash in [one for one in reversed(self.host.hashes()) if one in self._dirty]:
            while not lower.can_write and time.monotonic() < until:
                time.sleep(0.001)
                self.poll()
            if time.monotonic() >= until:
                break
            if own_hash in self._dirty:  # otherwise `poll` has written it
                self._write(own_hash)
        lower.close(max(until - time.monotonic(), 0.1))

    def stats(self) -> list[TierStats]:
        """Return the numbers of host memory, and of the store below."""
        host, lower, size = self.host, self.lower, self._block_bytes
        counts = self._saved, self._loaded, self._dropped
        stats = [TierStats("host", len(host), host.num_slots, size, *counts, 0)]
        if lower is not None:
            counts = self._written, self._read, 0
            known = len(lower.hashes())
            stats.append(TierStats(lower.name, known, None, size, *counts, lower.failures))
        return stats
