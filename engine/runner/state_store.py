"""The states of all slots on the device, and the slots of each step's rows."""

from __future__ import annotations

from collections import abc
from math import prod

import numpy as np
import torch

from ...kernels.device_copy import StagingBuffer, to_device
from ..config import EngineConfig
from ..devices.backend import Backend
from ..devices.steps import HostStep, StateRows
from ..errors import ConfigurationError
from ..states.state_spec import StateSpec
from ..states.step_states import StepStates
from ..step import StateCopy, StateSave


def make_state_store(
    config: EngineConfig, spec: StateSpec | None, backend: Backend, num_slots: int
) -> StateStore | None:
    """Make the store of the states of a model, if its layers keep any. Raises ConfigurationError if
    the device has no room for so many slots."""
    if spec is None:
        return None
    max_num_tokens = max(backend.token_budget(config), config.max_num_seqs)
    try:
        return StateStore(spec, num_slots, config.max_num_seqs, max_num_tokens, backend)
    except (torch.OutOfMemoryError, RuntimeError, OSError) as error:
        size = num_slots * spec.num_bytes / 2**30
        raise ConfigurationError(
            f"{num_slots} states of {spec.num_bytes / 1e6:.1f} MB ({size:.2f} GiB) do not fit the "
            f"memory of {backend.device}: lower --max-num-seqs"
        ) from error


def state_rows(host: HostStep, saves: abc.Sequence[StateSave]) -> StateRows:
    """Return the slots of a step's rows, and those of its snapshots `saves` by the tokens after
    which they are taken."""
    slots = np.array([one.state_slot for one in host.sequences], dtype=np.int64)
    places = np.empty((len(saves), 2), dtype=np.int64)
    batch_rows = {row: index for index, row in enumerate(host.order)} if saves else {}
    for place, (row, num_tokens, slot) in zip(places, saves, strict=True):
        at = batch_rows[row]
        place[:] = host.query_start_loc[at] + num_tokens - host.starts[at] - 1, slot
    return StateRows(slots, places)


class StateStore:
    """Holds the states. The tensors of a step stay at their addresses, for captured graphs."""

    def __init__(
        self,
        spec: StateSpec,
        num_slots: int,
        max_num_seqs: int,
        max_num_tokens: int,
        backend: Backend,
    ) -> None:
        def allocate(*shape: int) -> torch.Tensor:
            if prod(shape) == 0:
                return torch.zeros(shape, device=backend.device)
            return backend.allocate_kv_cache(shape, torch.float32, commit=False)

        layers = (spec.num_layers, num_slots)
        self._max_rows = max_num_seqs + 1  # one for the padding of a captured step
        self._size = self._max_rows + max_num_tokens
        self._staging = StagingBuffer(self._size, torch.int32, backend.device)
        self._staging.open()[:] = -1  # blank steps have no states
        both = self._staging.send(self._size)
        self.step = StepStates(
            allocate(*layers, spec.taps, spec.channels),
            allocate(*layers, spec.heads, spec.key_dim, spec.value_dim),
            both[: self._max_rows],
            both[self._max_rows :],
        )
        """The states of the step that is launched next."""

    def begin_step(self, rows: StateRows) -> None:
        """Take the slots of a step's rows, and where it leaves snapshots."""
        buffer = self._staging.open()
        buffer[:] = -1  # all of it: the step may be padded
        buffer[: len(rows.slots)] = rows.slots
        buffer[self._max_rows + rows.saves[:, 0]] = rows.saves[:, 1]
        self._staging.send(self._size)

    def copy(self, copies: abc.Sequence[StateCopy]) -> None:
        """Copy states from slot to slot, in order."""
        for batch in _batches(copies):
            sources, destinations = to_device(batch, torch.int64, self.step.slots.device)
            for states in (self.step.convolution, self.step.recurrent):
                states[:, destinations] = states[:, sources]


def _batches(copies: abc.Sequence[StateCopy]) -> abc.Iterator[tuple[list[int], list[int]]]:
    """Yield the sources and destinations of copies that can be made at once: none of them writes
    to a slot that another one reads or writes."""
    sources: list[int] = []
    destinations: list[int] = []
    for source, destination in copies:
        if source in destinations or destination in (*sources, *destinations):
            yield sources, destinations
            sources, destinations = [], []
        sources.append(source)
        destinations.append(destination)
    if sources:
        yield sources, destinations
