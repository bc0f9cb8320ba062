"""State slots: where layers such as linear attention and Mamba keep what they know of a sequence.

The state of such a layer stands for all tokens so far, in a fixed number of bytes. It is changed in
place by every token, so two sequences cannot share one, and there is no way back. A running
sequence holds a slot. The slots that are left keep *snapshots*: copies of states after a number of
whole blocks, found by the hash of the last of them. A cached prefix is of use only up to a
snapshot, from which the state is copied; tokens after it are computed again.

    running     slot 3 ◀─ tokens … 811                  slot 5 ◀─ tokens … 64
    snapshots   slot 0 = after block [t0 … t511]        slot 1 = after block [… t799], …
"""

from __future__ import annotations

from collections import OrderedDict, abc
from typing import NamedTuple

from ..sequence import Sequence, SequenceStatus
from ..step import StateCopy, StateSave

HashOf = abc.Callable[[Sequence, int], bytes]
"""A sequence, and the index of a full block in it → that block's hash."""


class _Pending(NamedTuple):
    """A snapshot that a launched step takes."""

    sequence: Sequence
    row: int
    num_tokens: int
    slot: int


class StateSlots:
    """Gives running sequences their slots, and keeps snapshots in the others.

    A slot is free, held by a running sequence, the least or a more recently used snapshot, or about
    to be filled by a launched step (pending). A running sequence always finds one: snapshots make
    way, and no more than `num_snapshots` slots are pending.
    """

    def __init__(
        self, max_num_seqs: int, num_snapshots: int, block_size: int, interval: int
    ) -> None:
        """`interval` is the number of tokens, a multiple of `block_size`, after which another
        snapshot of a sequence is due."""
        self.num_slots = max_num_seqs + num_snapshots
        self.num_snapshots = num_snapshots
        self._block_size = block_size
        self._interval = interval
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._snapshots: OrderedDict[bytes, int] = OrderedDict()
        """Slots by the hashes of blocks, the least recently used first."""
        self._pending: dict[int, list[_Pending]] = {}
        self._num_pending = 0
        self._copies: list[StateCopy] = []

    @property
    def num_cached(self) -> int:
        """Number of snapshots that can be found."""
        return len(self._snapshots)

    # -- running sequences -------------------------------------------------------------------

    def count_usable(self, hashes: abc.Sequence[bytes]) -> int:
        """Return how many of the leading blocks with these hashes are of use: the last one of them
        has a snapshot."""
        for count in range(len(hashes), 0, -1):
            if hashes[count - 1] in self._snapshots:
                return count
        return 0

    def hold(self, sequence: Sequence, snapshot: bytes | None) -> None:
        """Give a sequence that begins to run its slot, with the state of a snapshot. Without one,
        its first step starts from zero."""
        source = None if snapshot is None else self._snapshots[snapshot]
        if snapshot is not None:
            self._snapshots.move_to_end(snapshot)
        slot = sequence.state_slot = self._take()
        if source is not None and source != slot:  # else it was the last snapshot to make way
            self._copies.append(StateCopy(source, slot))

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give `child` a slot with the state of `parent`."""
        child.state_slot = self._take()
        self._copies.append(StateCopy(parent.state_slot, child.state_slot))

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's slot back, if it holds one. Steps in flight may still write to it; its
        next holder does so later."""
        if sequence.state_slot >= 0:
            self._free.append(sequence.state_slot)
            sequence.state_slot = -1

    def take_copies(self) -> list[StateCopy]:
        """Return the copies that the next step must make first."""
        copies, self._copies = self._copies, []
        return copies

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        _, slot = self._snapshots.popitem(last=False)
        return slot

    # -- snapshots ---------------------------------------------------------------------------

    def plan_saves(
        self, step: int, rows: list[Sequence], starts: list[int], counts: list[int]
    ) -> list[StateSave]:
        """Choose the snapshots that a step takes, whose rows compute these tokens.

        They are taken after every `interval` tokens, after the last whole block before the end of
        the prompt, and where the prompt was found to part from another one.
        """
        if not self.num_snapshots:
            return []
        pending = []
        for row, (sequence, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            end = start + count
            if end // self._block_size == start // self._block_size:
                continue  # most rows: no block becomes full
            for num_tokens in self._due(sequence, start, end):
                if self._num_pending == self.num_snapshots:
                    break
                pending.append(_Pending(sequence, row, num_tokens, self._take()))
                self._num_pending += 1
        if pending:
            self._pending[step] = pending
        return [StateSave(row, num_tokens, slot) for _, row, num_tokens, slot in pending]

    def _due(self, sequence: Sequence, start: int, end: int) -> list[int]:
        """Return after how many tokens snapshots are due, within (start, end], the last first: if
        slots run out, the later ones are of more use."""
        due = set(range(start - start % self._interval, end + 1, self._interval))
        due.add((sequence.num_prompt_tokens - 1) // self._block_size * self._block_size)
        due.add(sequence.state_mark)
        return sorted((number for number in due if start < number <= end), reverse=True)

    def commit(self, step: int, failed: abc.Container[int], hash_of: HashOf) -> None:
        """Make the snapshots of a step that has ended findable; `failed` are rows whose numbers do
        not count."""
        for sequence, row, num_tokens, slot in self._pending.pop(step, ()):
            self._num_pending -= 1
            if row in failed or sequence.status is SequenceStatus.FINISHED:
                self._free.append(slot)
                continue
            key = hash_of(sequence, num_tokens // self._block_size - 1)
            if key in self._snapshots:
                self._free.append(slot)
            else:
                self._snapshots[key] = slot

    def drop_pending(self) -> None:
        """Give up the snapshots of steps that were launched and failed. None is in flight."""
        for pending in self._pending.values():
            self._free.extend(save.slot for save in pending)
        self._pending.clear()
        self._num_pending = 0

    def forget(self, hashes: abc.Iterable[bytes]) -> None:
        """Give up the snapshots after the blocks with these hashes."""
        for key in hashes:
            slot = self._snapshots.pop(key, None)
            if slot is not None:
                self._free.append(slot)

    def forget_all(self) -> None:
        """Give up all snapshots."""
        self.forget(list(self._snapshots))

    def check_integrity(self, sequences: abc.Iterable[Sequence]) -> None:
        """Assert that every slot has one use. `sequences` are all that hold blocks."""
        held = [sequence.state_slot for sequence in sequences if sequence.block_table]
        assert all(slot >= 0 for slot in held), "a running sequence without a state slot"
        pending = [save.slot for saves in self._pending.values() for save in saves]
        assert len(pending) == self._num_pending <= self.num_snapshots
        slots = [*self._free, *held, *self._snapshots.values(), *pending]
        assert sorted(slots) == list(range(self.num_slots)), "a state slot is lost or used twice"
