"""Copies between host and device that make neither wait for the other.

A copy from or to pageable memory blocks the host until the stream has caught up; one from or to
pinned memory does not. PyTorch's caching host allocator keeps a pinned buffer alive until the
copies that use it are done. On a device that shares the host's memory, nothing is pinned or copied.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def _has_own_memory(device: torch.device) -> bool:
    return device.type == "cuda"


def to_device(
    values: Sequence[Any] | NDArray[Any], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a tensor of (nested) `values` on `device`."""
    # Twice as fast as torch.tensor.
    return upload(torch.from_numpy(np.asarray(values)).to(dtype), device)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Return a copy of `host` on `device`, or `host` itself if the device shares its memory."""
    if _has_own_memory(device):
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def upload_into(target: Tensor, host: Tensor) -> None:
    """Copy `host` into the device tensor `target`, of the same shape."""
    if _has_own_memory(target.device):
        host = host.pin_memory()
    target.copy_(host, non_blocking=True)


class StagingBuffer:
    """A pinned buffer on the host whose content is sent to one place on the device, again and
    again."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate `size` zeros on both sides."""
        pinned = _has_own_memory(device)
        self._host = torch.zeros(size, dtype=dtype, pin_memory=pinned)
        self._on_device = torch.zeros(size, dtype=dtype, device=device)
        self._sent: torch.cuda.Event | None = None
        if pinned:
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._array = self._host.numpy()

    def open(self) -> np.ndarray[Any, Any]:
        """Wait until the last copy has been made, then return the host's side to be filled."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._array

    def send(self, length: int) -> Tensor:
        """Copy the first `length` elements; returns them on the device, valid until the next."""
        on_device = self._on_device[:length].copy_(self._host[:length], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        return on_device


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of copies to the host, one for each device."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


_COPIED_WHOLE = 1 << 14
"""Bytes of memory up to which all of a tensor's is copied: it may hold other results, too."""


class Downloads:
    """Copies of device tensors to the host that are waited for together: `add` each, `end` once,
    and `wait` before reading them.

    They run on a stream of their own, after all that was launched before the first `add`, so that
    the next step need not wait for them. What overwrites a tensor that was added must be launched
    after `hold_stream`.
    """

    def __init__(self) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._whole: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> Tensor:
        """Begin a copy and return the host's tensor. A tensor on the host is returned as it is."""
        if not _has_own_memory(tensor.device):
            return tensor
        if self._stream is None:
            self._stream = _copy_stream(tensor.device)
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        memory = tensor.untyped_storage()
        if memory.nbytes() > _COPIED_WHOLE:
            return self._copy(tensor)
        if memory.data_ptr() not in self._whole:
            everything = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory)
            self._whole[memory.data_ptr()] = self._copy(everything)
        copied = self._whole[memory.data_ptr()].untyped_storage()
        place = (tensor.storage_offset(), tensor.shape, tensor.stride())
        return torch.empty(0, dtype=tensor.dtype).set_(copied, *place)

    def _copy(self, tensor: Tensor) -> Tensor:
        assert self._stream is not None
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(self._stream):
            pinned.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is not given to others before that
        return pinned

    def end(self) -> None:
        """Mark the end of the copies in their stream."""
        if self._arrived is not None:
            self._arrived.record(self._stream)

    def hold_stream(self) -> None:
        """Let what is launched from now on run after the copies."""
        if self._arrived is not None:
            torch.cuda.current_stream().wait_event(self._arrived)

    def wait(self) -> None:
        """Wait until all copies have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
