"""Copies blocks of the KV cache to pinned host memory and back, beside the steps.

Blocks that are saved are gathered into a buffer on the device, as fast as the device's own memory
is; from there they go to the host in a stream of their own, while the step runs. Loads take the way
back, through a second buffer: the host launches a step while the device is still at the one before,
so that they arrive beside that one, and are scattered before theirs.
"""

from __future__ import annotations

import contextlib
from collections import abc, deque
from typing import NamedTuple

import torch

from ...kernels.device_copy import to_device
from ..errors import ConfigurationError
from ..step import BlockLoad, BlockSave
from .host_blocks import HostLayout, host_layout

BUFFER_BYTES = 32 << 20
"""Size of each buffer on the device; more blocks than it holds take turns."""


class _Copies(NamedTuple):
    """Copies of a step, and when they end."""

    step: int
    end: torch.cuda.Event


class StreamedBlocks:
    """Implements HostBlocks, which states the contract.

    It also runs on tensors of the CPU, for tests; there it has no streams.
    """

    def __init__(
        self, caches: abc.Sequence[torch.Tensor], memory: memoryview, device: torch.device
    ) -> None:
        """Raises ConfigurationError if the memory cannot be pinned."""
        self._layout: HostLayout = host_layout(caches, memory)
        self._device = device
        slots = self._layout.slots
        size = max(1, min(len(slots), BUFFER_BYTES // (slots.shape[1] * slots.itemsize)))
        self._outgoing = torch.empty((size, slots.shape[1]), dtype=slots.dtype, device=device)
        self._incoming = torch.empty_like(self._outgoing)
        self._stream: torch.cuda.Stream | None = None
        self._sent: torch.cuda.Event | None = None
        """When the last blocks of `_outgoing` have arrived at the host."""
        self._scattered: torch.cuda.Event | None = None
        """When the blocks of `_incoming` have been copied to the cache."""
        self._running: deque[_Copies] = deque()
        self._last_step = 0
        if device.type == "cuda":
            _pin(slots)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def move(
        self, step: int, saves: abc.Sequence[BlockSave], loads: abc.Sequence[BlockLoad]
    ) -> None:
        size = len(self._outgoing)
        for at in range(0, len(saves), size):
            self._save(saves[at : at + size])
        for at in range(0, len(loads), size):
            self._load(loads[at : at + size])
        self._last_step = step
        if self._sent is not None and saves:
            self._running.append(_Copies(step, self._sent))
        if self._scattered is not None and loads:
            self._running.append(_Copies(step, self._scattered))

    def ended(self) -> int:
        running = self._running
        while running and running[0].end.query():  # type: ignore[no-untyped-call]
            running.popleft()
        return running[0].step - 1 if running else self._last_step

    def wait(self) -> None:
        if self._stream is not None:
            torch.cuda.synchronize(self._device)

    def _save(self, saves: abc.Sequence[BlockSave]) -> None:
        # 1. Gather, once the buffer is free.
        self._main_waits(self._sent)
        block_ids = to_device([block for block, _ in saves], torch.int64, self._device)
        for part, buffer in zip(self._layout.parts, self._split(self._outgoing), strict=True):
            buffer[: len(saves)] = part.blocks[block_ids]
        # 2. Send, once that is done.
        with self._beside(self._recorded()):
            for buffered, (_, slot) in zip(self._outgoing, saves, strict=False):
                self._layout.slots[slot].copy_(buffered, non_blocking=True)
            self._sent = self._recorded()

    def _load(self, loads: abc.Sequence[BlockLoad]) -> None:
        # 1. Fetch, once the buffer is free. The slots were written in the same stream before.
        with self._beside(self._scattered):
            for buffered, (slot, _) in zip(self._incoming, loads, strict=False):
                buffered.copy_(self._layout.slots[slot], non_blocking=True)
            fetched = self._recorded()
        # 2. Scatter, once that is done.
        self._main_waits(fetched)
        block_ids = to_device([block for _, block in loads], torch.int64, self._device)
        for part, buffer in zip(self._layout.parts, self._split(self._incoming), strict=True):
            part.blocks[block_ids] = buffer[: len(loads)]
        self._scattered = self._recorded()

    def _split(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of a buffer as blocks of each cache."""
        shapes = [slots.shape[1:] for _, slots in self._layout.parts]
        parts = torch.split(buffer, [shape.numel() for shape in shapes], dim=1)
        return [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def _recorded(self) -> torch.cuda.Event | None:
        """Return an event of the current stream, as it stands now."""
        return None if self._stream is None else torch.cuda.current_stream().record_event()

    def _main_waits(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    @contextlib.contextmanager
    def _beside(self, event: torch.cuda.Event | None) -> abc.Iterator[None]:
        """Launch into the stream of copies, after an event."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if event is not None:
                self._stream.wait_event(event)
            yield


def _pin(slots: torch.Tensor) -> None:
    """Pin the pages of a tensor. Raises ConfigurationError."""
    size = slots.numel() * slots.itemsize
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    failed = int(runtime.cudaHostRegister(slots.data_ptr(), size, 0))
    if failed:
        raise ConfigurationError(
            f"--kv-offloading-size: the system does not let {size / 2**30:.2f} GiB of memory be "
            f"pinned (CUDA error {failed})"
        )
