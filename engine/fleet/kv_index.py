"""Which engines of a fleet have which blocks cached.

The engines' own events feed it, so it also hears of evictions. It holds a bit for each engine and
known block, and every process that routes has one of its own: after a start or a gap it is filled
from an engine's list of known blocks, so there is nothing to keep or to agree on.
"""

from __future__ import annotations

from collections import abc, deque
from typing import NamedTuple

from ..events.block_events import BlockChanges, block_key, split_keys

EXPECTED_SECONDS = 2.0
"""How long a routed prompt counts as cached before the engine's events say so: about the time in
which a long prompt is computed. A burst of equal prompts stays together because of it."""


class _Expected(NamedTuple):
    until: float
    key: bytes
    bit: int


class KVIndex:
    """Maps blocks to the engines that hold them. Times are in seconds of the caller's clock.

    Forgetting all blocks of an engine retires its bit and gives it another one. What the retired
    bits have marked is swept out once it is a third of the index, so that it costs little on
    average, however many engines there are.
    """

    def __init__(self, expected_seconds: float = EXPECTED_SECONDS) -> None:
        self._expected_seconds = expected_seconds
        self._bits: dict[str, int] = {}
        """A bit of its own for each engine."""
        self._names: dict[int, str] = {}
        """The engine of each bit's number."""
        self._live = 0
        """The bits of all engines."""
        self._counts: dict[int, int] = {}
        """How many known blocks are marked with each bit, retired ones included."""
        self._num_retired = 0
        """Their sum over the retired bits."""
        self._known: dict[bytes, int] = {}
        """Key of a block → the bits of the engines that hold it."""
        self._expected: dict[bytes, dict[int, float]] = {}
        """Key of a block → until when each engine is expected to hold it, by its bit."""
        self._expiring: deque[_Expected] = deque()
        self._sequences: dict[str, int | None] = {}
        """Number of the last changes of each engine; None while its known blocks are awaited."""

    def __len__(self) -> int:
        """Return the number of blocks in the index; some may be those of engines that have left."""
        return len(self._known)

    @property
    def engines(self) -> abc.KeysView[str]:
        """The engines that have joined."""
        return self._bits.keys()

    # -- engines ---------------------------------------------------------------------------

    def add_engine(self, engine: str) -> None:
        """Let an engine join, of which nothing is known until `reset`."""
        assert engine not in self._bits, engine
        self._give_bit(engine)
        self._sequences[engine] = None

    def remove_engine(self, engine: str) -> None:
        """Forget an engine and its blocks."""
        self._retire_bit(engine)
        del self._bits[engine], self._sequences[engine]

    def reset(self, engine: str, sequence: int, keys: bytes) -> None:
        """Take over all blocks that an engine holds, as of its changes of number `sequence`.

        `keys` stand one after the other.
        """
        self._clear(engine)
        self._store(self._bits[engine], split_keys(keys))
        self._sequences[engine] = sequence

    def apply(self, engine: str, changes: BlockChanges) -> bool:
        """Take over an engine's changes.

        Returns False if some before them are missing: then ask the engine for its known blocks.
        Until `reset` brings them, changes have no effect, and True is returned.
        """
        last = self._sequences[engine]
        if last is None or changes.sequence <= last:
            return True  # `reset` includes them
        if changes.sequence > last + 1:
            self._sequences[engine] = None
            return False
        self._sequences[engine] = changes.sequence
        if changes.cleared:
            self._clear(engine)
        bit = self._bits[engine]
        for key in split_keys(changes.removed):
            self._remove(bit, key)
        self._store(bit, split_keys(changes.stored))
        return True

    # -- blocks ----------------------------------------------------------------------------

    def expect(self, engine: str, hashes: abc.Sequence[bytes], now: float) -> None:
        """Count the blocks as cached for a while, since a prompt with them goes to the engine."""
        bit, until = self._bits[engine], now + self._expected_seconds
        for key in map(block_key, hashes):
            if not self._known.get(key, 0) & bit:
                self._expected.setdefault(key, {})[bit] = until
                self._expiring.append(_Expected(until, key, bit))

    def match(self, hashes: abc.Sequence[bytes], now: float) -> dict[str, int]:
        """Return how many of a prompt's first blocks each engine holds, for those with any."""
        self._expire(now)
        found: dict[str, int] = {}
        have = self._live  # the engines that hold all blocks so far
        for count, one in enumerate(hashes):
            key = block_key(one)
            holders = self._known.get(key, 0)
            if key in self._expected:
                for bit in self._expected[key]:
                    holders |= bit
            if lost := have & ~holders:
                if count:
                    self._note(found, lost, count)
                have &= holders
                if not have:
                    return found
        if hashes:
            self._note(found, have, len(hashes))
        return found

    def known(self, engine: str) -> set[bytes]:
        """Return the keys of all blocks that an engine is known to hold."""
        bit = self._bits[engine]
        return {key for key, holders in self._known.items() if holders & bit}

    def _note(self, found: dict[str, int], bits: int, count: int) -> None:
        """Write down that the engines of `bits` hold so many blocks."""
        while bits:
            lowest = bits & -bits
            found[self._names[lowest.bit_length() - 1]] = count
            bits ^= lowest

    def _store(self, bit: int, keys: abc.Iterable[bytes]) -> None:
        known, count = self._known, 0
        for key in keys:
            holders = known.get(key, 0)
            if not holders & bit:
                known[key] = holders | bit
                count += 1
        self._counts[bit] += count

    def _remove(self, bit: int, key: bytes) -> None:
        holders = self._known.get(key, 0)
        if holders & bit:
            self._counts[bit] -= 1
            if holders == bit:
                del self._known[key]
            else:
                self._known[key] = holders ^ bit
        self._drop_expected(key, bit)

    # -- bits ------------------------------------------------------------------------------

    def _give_bit(self, engine: str) -> None:
        number = 0
        while 1 << number in self._counts:
            number += 1
        bit = 1 << number
        self._names[number] = engine
        self._bits[engine] = bit
        self._counts[bit] = 0
        self._live |= bit

    def _clear(self, engine: str) -> None:
        """Forget all blocks that an engine is known or expected to hold."""
        self._retire_bit(engine)
        self._give_bit(engine)

    def _retire_bit(self, engine: str) -> None:
        bit = self._bits[engine]
        del self._names[bit.bit_length() - 1]
        self._live ^= bit
        self._num_retired += self._counts[bit]
        if 2 * self._num_retired >= len(self._known):
            self._sweep()

    def _sweep(self) -> None:
        """Take what retired bits have marked out of the index, so that the bits can be reused."""
        live = self._live
        self._known = {key: left for key, bits in self._known.items() if (left := bits & live)}
        self._counts = {bit: count for bit, count in self._counts.items() if bit & live}
        self._num_retired = 0
        for key, bits in list(self._expected.items()):
            for bit in [bit for bit in bits if not bit & live]:
                self._drop_expected(key, bit)

    def _expire(self, now: float) -> None:
        while self._expiring and self._expiring[0].until <= now:
            until, key, bit = self._expiring.popleft()
            if self._expected.get(key, {}).get(bit) == until:  # it was not expected again since
                self._drop_expected(key, bit)

    def _drop_expected(self, key: bytes, bit: int) -> None:
        bits = self._expected.get(key)
        if bits is not None:
            bits.pop(bit, None)
            if not bits:
                del self._expected[key]
