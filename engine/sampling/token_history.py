"""The tokens of penalised sequences, kept on the device."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable

import torch

from ...kernels.device_copy import to_device
from ..step import SequenceSpec

_INITIAL_SLOTS, _INITIAL_CAPACITY = 8, 256


class TokenHistory:
    """One row of tokens per sequence. A step appends what is new and copies nothing else.

    A sequence gets a slot when it is first recorded, and gives it back with `forget`. Its row
    begins with the tokens of its spec; each sampled token is appended on the device by whoever
    computes with it next. Forked and preempted sequences have new specs, so they need no special
    care.
    """

    def __init__(self, device: torch.device) -> None:
        self.tokens = torch.zeros(
            (_INITIAL_SLOTS, _INITIAL_CAPACITY), dtype=torch.int32, device=device
        )
        """[slots, capacity]; the elements beyond a sequence's length are stale."""
        self._slots: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._free = list(range(_INITIAL_SLOTS))

    def __len__(self) -> int:
        return len(self._slots)

    def record(
        self, sequences: abc.Sequence[SequenceSpec], lengths: abc.Sequence[int]
    ) -> list[int]:
        """Bring the rows up to `lengths` tokens, with room for one more; return their slots.

        Tokens that are not recorded yet are taken from the sequences' specs. If one is missing
        there, the sequence's row failed in the last step before its token was recorded; 0 stands
        for it, since the results of this step will be dropped.
        """
        missing = sum(sequence.seq_id not in self._slots for sequence in sequences)
        self._reserve(missing, max(lengths) + 1)
        capacity = self.tokens.shape[1]
        indices: list[int] = []
        values: list[int] = []
        recorded: dict[int, int] = {}
        for sequence, length in zip(sequences, lengths, strict=True):
            seq_id = sequence.seq_id
            if seq_id not in self._slots:
                self._slots[seq_id] = self._free.pop()
                self._lengths[seq_id] = 0
            start = self._lengths[seq_id]
            if start < length:
                base = self._slots[seq_id] * capacity
                indices.extend(range(base + start, base + length))
                known = sequence.token_ids[start:length]
                values.extend(known)
                values.extend([0] * (length - start - len(known)))
                recorded[seq_id] = length
        if indices:
            updates = to_device([indices, values], torch.int64, self.tokens.device)
            self.tokens.view(-1).scatter_(0, updates[0], updates[1].to(torch.int32))
        self._lengths.update(recorded)  # last: a step that runs out of memory is tried again
        return [self._slots[sequence.seq_id] for sequence in sequences]

    def extend(self, sequences: abc.Sequence[SequenceSpec], lengths: abc.Sequence[int]) -> None:
        """Note that the rows now hold `lengths` tokens, since someone wrote them on the device."""
        for sequence, length in zip(sequences, lengths, strict=True):
            self._lengths[sequence.seq_id] = length

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Give the slots of these sequences back. Unknown ids are ignored."""
        for seq_id in seq_ids:
            slot = self._slots.pop(seq_id, None)
            if slot is not None:
                del self._lengths[seq_id]
                self._free.append(slot)

    def _reserve(self, num_slots: int, capacity: int) -> None:
        """Grow by doubling until `num_slots` are free and each holds `capacity` tokens."""
        old_slots, old_capacity = self.tokens.shape
        slots, width = old_slots, old_capacity
        while slots - len(self._slots) < num_slots:
            slots *= 2
        while width < capacity:
            width *= 2
        if (slots, width) != (old_slots, old_capacity):
            grown = self.tokens.new_zeros((slots, width))
            grown[:old_slots, :old_capacity] = self.tokens
            self.tokens = grown
            self._free.extend(range(old_slots, slots))
