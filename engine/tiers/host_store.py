"""Blocks in host memory: equal slots, of which the least recently used is given up first."""

from __future__ import annotations

from collections import OrderedDict, abc, deque
from itertools import islice

NEVER = -1
"""The step of a slot that no step has used."""
_LOOKED_AT = 8
"""Slots to look at for one that may be given up."""


class HostStore:
    """Maps hashes to slots of one piece of memory. Implements BlockStore, and lends out its slots:
    the device copies blocks to and from them by itself.

    A step of the device reads and writes slots while the host goes on, so each slot remembers the
    last step that uses it, and gets new content only after that step has ended (`ended`). A slot
    that a thread reads or writes is held.
    """

    def __init__(self, memory: memoryview, block_bytes: int) -> None:
        self._memory = memory
        self._block_bytes = block_bytes
        self.num_slots = len(memory) // block_bytes
        self.ended = NEVER
        """The last step of which it is certain that the device has ended it."""
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        """By hash, the least recently used first."""
        self._free: deque[int] = deque(range(self.num_slots))
        self._last_step = [NEVER] * self.num_slots
        self._held: set[int] = set()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, own_hash: bytes) -> bool:
        return own_hash in self._slots

    def hashes(self) -> list[bytes]:
        """Return the hashes of all blocks, the least recently used first."""
        return list(self._slots)

    @property
    def num_free(self) -> int:
        """Slots that hold no block and are not reserved."""
        return len(self._free)

    def oldest(self, count: int) -> list[bytes]:
        """Return the hashes of the least recently used blocks."""
        return list(islice(self._slots, max(count, 0)))

    def view(self, slot: int) -> memoryview:
        """Return the memory of a slot."""
        start = slot * self._block_bytes
        return self._memory[start : start + self._block_bytes]

    # -- slots -----------------------------------------------------------------------------

    def use(self, own_hash: bytes, step: int | None = None) -> int:
        """Return the slot of a block that is there, which becomes the most recently used one.
        `step` is the step that will read it, if one will."""
        slot = self._slots[own_hash]
        self._slots.move_to_end(own_hash)
        if step is not None:
            self._last_step[slot] = step
        return slot

    def reserve(self, keep: abc.Container[bytes] = ()) -> tuple[int, bytes | None] | None:
        """Take a slot out, with the hash of the block that was given up for it, if one was; those
        in `keep` only if there is no other among the oldest. Returns None if all are in use."""
        for _ in range(min(len(self._free), _LOOKED_AT)):
            slot = self._free.popleft()
            if self._may_change(slot):
                return slot, None
            self._free.append(slot)
        for own_hash in sorted(self.oldest(_LOOKED_AT), key=lambda own_hash: own_hash in keep):
            slot = self._slots[own_hash]
            if self._may_change(slot):
                del self._slots[own_hash]
                return slot, own_hash
        return None

    def put(self, own_hash: bytes, slot: int, step: int | None = None) -> None:
        """Let a reserved slot hold a block. `step` is the step that will write it; None if it has
        been written."""
        assert own_hash not in self._slots
        self._slots[own_hash] = slot
        if step is not None:
            self._last_step[slot] = step

    def give_back(self, slot: int) -> None:
        """Give back a reserved slot."""
        self._free.append(slot)

    def take_out(self, own_hash: bytes) -> int:
        """Forget a block that is there, and reserve its slot."""
        return self._slots.pop(own_hash)

    def discard(self, own_hash: bytes) -> None:
        """Forget a block, if it is there."""
        if own_hash in self._slots:
            self.give_back(self.take_out(own_hash))

    def hold(self, own_hash: bytes) -> int | None:
        """Let nothing change the slot of a block that is there until it is let go. Returns it, or
        None if a step may still have to write it."""
        slot = self._slots[own_hash]
        if not self._may_change(slot):
            return None
        self._held.add(slot)
        return slot

    def let_go(self, slot: int) -> None:
        """End a hold."""
        self._held.remove(slot)

    def _may_change(self, slot: int) -> bool:
        return self._last_step[slot] <= self.ended and slot not in self._held

    # -- BlockStore ------------------------------------------------------------------------

    def contains(self, hashes: abc.Sequence[bytes]) -> list[bool]:
        return [own_hash in self._slots for own_hash in hashes]

    def load(self, own_hash: bytes, into: memoryview) -> bool:
        if own_hash not in self._slots or len(into) != self._block_bytes:
            return False
        into[:] = self.view(self.use(own_hash))
        return True

    def store(self, own_hash: bytes, record: memoryview) -> list[bytes]:
        self.discard(own_hash)
        if not record:
            return []
        reserved = self.reserve()
        if reserved is None:
            return []
        slot, lost = reserved
        self.view(slot)[:] = record
        self.put(own_hash, slot)
        return [] if lost is None else [lost]

    def close(self) -> None:
        self._slots.clear()
        self._free = deque(range(self.num_slots))

    def check_integrity(self) -> None:
        """Assert that every slot is free, or holds one block, or is reserved."""
        taken = [*self._free, *self._slots.values()]
        assert len(set(taken)) == len(taken), "a slot is in two places"
        assert all(0 <= slot < self.num_slots for slot in taken)
