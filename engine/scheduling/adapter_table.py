"""The adapters that are loaded, and which of them have a slot on the device.

An adapter's id stands for one version of it: loading a name again gives it a new id. Requests that
began with the old version finish with it, and the prefix index keeps the versions apart, by a hash
of their weights: what was computed with the same weights under the same name can be found again.

A running sequence holds the slot of its adapter. A slot whose adapter has no running sequence stays
as it is until another adapter needs it, so that an adapter that comes back need not be copied.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..errors import InvalidRequestError, ModelNotFoundError
from ..lora import AdapterSource, adapter_key
from ..sequence import Sequence
from ..step import AdapterLoad

MAX_PASSES = 32
"""Sequences that may pass one that waits for a slot, so that nobody waits for ever."""


class AdapterTable:
    """Names, ids and slots of adapters. Sequences without an adapter never get here."""

    def __init__(self, num_slots: int = 0, max_adapters: int = 0) -> None:
        """At most `num_slots` different adapters run at a time, at most `max_adapters` are
        loaded."""
        self._max_adapters = max_adapters
        self._sources: dict[str, AdapterSource] = {}
        self._ids: dict[str, int] = {}
        self._names: dict[int, str] = {}
        """The names of all ids that are loaded or that an unfinished sequence uses."""
        self._keys: dict[int, str] = {}
        """The `adapter_key` of each of these ids."""
        self._next_id = 0
        self._unfinished: Counter[int] = Counter()
        self._running: Counter[int] = Counter()
        self._slots: dict[int, int] = {}
        """The slot of each adapter that has one. Those that run no sequence are in the order in
        which they last did, the first one longest ago."""
        self._free = list(range(num_slots - 1, -1, -1))
        self._blocked: set[int] = set()
        """The adapters that were found to wait for a slot while this step was planned."""
        self._passes: Counter[int] = Counter()
        """How many sequences have passed those that wait for this adapter's slot."""
        self._loads: list[AdapterLoad] = []
        self._dropped: list[int] = []

    # -- what is loaded ----------------------------------------------------------------------

    @property
    def sources(self) -> tuple[AdapterSource, ...]:
        """The loaded adapters, in the order of their first loading."""
        return tuple(self._sources.values())

    def check_name(self, name: str, *, replace: bool) -> None:
        """Raise InvalidRequestError if no adapter can be loaded under this name."""
        if name in self._ids:
            if not replace:
                raise InvalidRequestError(
                    f"the adapter {name!r} is loaded already: set load_inplace to replace it",
                    "lora_name",
                )
        elif len(self._ids) >= self._max_adapters:
            raise InvalidRequestError(
                f"{self._max_adapters} adapters are loaded already, the maximum of "
                "--max-cpu-loras: unload one first",
                "lora_name",
            )

    def add(self, source: AdapterSource) -> int:
        """Make an adapter known, in place of another version of that name, and return its id."""
        adapter_id, self._next_id = self._next_id, self._next_id + 1
        if source.name in self._ids:
            self._retire(self._ids[source.name])
        self._ids[source.name] = adapter_id
        self._names[adapter_id] = source.name
        version = source.version or f"#{adapter_id}"
        self._keys[adapter_id] = adapter_key(source.name, version)
        self._sources[source.name] = source
        return adapter_id

    def remove(self, name: str) -> None:
        """Refuse new requests for an adapter; those that it has finish. Raises
        ModelNotFoundError if it is not loaded."""
        self.id_of(name)
        del self._sources[name]
        self._retire(self._ids.pop(name))

    def id_of(self, name: str) -> int:
        """Return the id of the adapter's present version. Raises ModelNotFoundError."""
        adapter_id = self._ids.get(name)
        if adapter_id is None:
            raise ModelNotFoundError(f"the model {name[:128]!r} is not served here", "model")
        return adapter_id

    def take_dropped(self) -> list[int]:
        """Return the ids that nobody can use any more since this was last called."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _retire(self, adapter_id: int) -> None:
        if not self._unfinished[adapter_id]:
            self._drop(adapter_id)

    def _drop(self, adapter_id: int) -> None:
        del self._names[adapter_id], self._keys[adapter_id], self._passes[adapter_id]
        if adapter_id in self._slots:
            self._free.append(self._slots.pop(adapter_id))
        self._dropped.append(adapter_id)

    # -- who uses them -----------------------------------------------------------------------

    def hold(self, sequence: Sequence, adapter_id: int) -> None:
        """Bind a new sequence to this version of its adapter."""
        sequence.adapter_id, sequence.adapter_key = adapter_id, self._keys[adapter_id]
        self._unfinished[adapter_id] += 1

    def release(self, sequence: Sequence) -> None:
        """Note the end of a sequence that has an adapter."""
        adapter_id = sequence.adapter_id
        assert adapter_id is not None
        self._unfinished[adapter_id] -= 1
        if not self._unfinished[adapter_id]:
            del self._unfinished[adapter_id]
            if self._ids.get(self._names[adapter_id]) != adapter_id:
                self._drop(adapter_id)

    def can_run(self, adapter_id: int) -> bool:
        """Return whether the adapter has a slot or can get one."""
        return (
            adapter_id in self._slots or bool(self._free) or len(self._running) < len(self._slots)
        )

    def begin_admission(self) -> None:
        """Begin to ask `admits` of waiting sequences, in the order in which they wait."""
        self._blocked.clear()

    def admits(self, sequence: Sequence) -> bool:
        """Return whether a waiting sequence with an adapter may start. Call `admitted` if it then
        does.

        One that needs a slot while none is free lets those behind it pass whose adapters run, but
        only MAX_PASSES of them: then adapters that run get no new sequences until the one that
        waits has its slot.
        """
        adapter_id = sequence.adapter_id
        assert adapter_id is not None
        if not self.can_run(adapter_id):
            self._blocked.add(adapter_id)
            return False
        return all(self._passes[one] < MAX_PASSES for one in self._blocked)

    def admitted(self, sequence: Sequence) -> None:
        """Count a sequence with an adapter that has passed others which wait for a slot."""
        self._passes.update(self._blocked)

    def start(self, sequence: Sequence) -> None:
        """Give a sequence that begins to run the slot of its adapter."""
        adapter_id = sequence.adapter_id
        assert adapter_id is not None
        if adapter_id not in self._slots:
            if not self._free:
                idle = next(one for one in self._slots if one not in self._running)
                self._free.append(self._slots.pop(idle))
            slot = self._slots[adapter_id] = self._free.pop()
            self._loads.append(AdapterLoad(slot, adapter_id))
            del self._passes[adapter_id]
        self._running[adapter_id] += 1
        sequence.adapter_slot = self._slots[adapter_id]

    def stop(self, sequence: Sequence) -> None:
        """Note that a sequence does not run any more."""
        adapter_id = sequence.adapter_id
        assert adapter_id is not None
        sequence.adapter_slot = -1
        self._running[adapter_id] -= 1
        if not self._running[adapter_id]:
            del self._running[adapter_id]
            self._slots[adapter_id] = self._slots.pop(adapter_id)  # the last to be replaced

    def take_loads(self) -> list[AdapterLoad]:
        """Return the slots that must be filled before the next step, since this was last called."""
        loads, self._loads = self._loads, []
        return loads

    # -- statistics --------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Return the names of the adapters of running and of waiting sequences, and of those that
        have a slot, as fields of EngineStats."""
        if not self._ids and not self._unfinished:
            return {}
        waiting = self._unfinished - self._running
        ids = {"running": self._running, "waiting": waiting, "held": self._slots}
        return {
            f"{how}_adapters": sorted({self._names[one] for one in which})
            for how, which in ids.items()
        }

    def check_integrity(self, running: list[Sequence]) -> None:
        """Assert that the table agrees with the running sequences."""
        counts = Counter(one.adapter_id for one in running if one.adapter_id is not None)
        assert counts == self._running
        slots = [*self._slots.values(), *self._free]
        assert len(set(slots)) == len(slots)
        for one in running:
            slot = -1 if one.adapter_id is None else self._slots[one.adapter_id]
            assert one.adapter_slot == slot, one
