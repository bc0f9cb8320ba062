"""A sanitizer of memory accesses under Triton's interpreter.

Every address that a kernel reads or writes must lie within a tensor that its launch was given,
unless its mask is false there. The interpreter itself would read whatever is at the address.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime import interpreter

_Ranges = tuple[NDArray[np.uint64], NDArray[np.uint64]]


class OutOfBoundsError(AssertionError):
    """A kernel has read or written outside of its tensors."""


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first address of a tensor and the one after its last element."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in pairs)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _ranges(tensors: list[torch.Tensor]) -> _Ranges:
    """Return the starts and ends of the tensors' memory, ascending, those that touch as one."""
    merged: list[list[int]] = []
    for start, end in sorted(map(_range, tensors)):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    columns = np.array(merged or [[0, 0]], dtype=np.uint64)
    return columns[:, 0], columns[:, 1]


class _CheckedMemory:
    """The interpreter's memory operations with a check in front of each."""

    def __init__(self, operations: Any) -> None:
        self._operations = operations
        self.kernel = ""
        self.allowed = _ranges([])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operations, name)

    def _check(self, verb: str, addresses: Any, mask: Any, item_size: int) -> None:
        starts, ends = self.allowed
        live = np.asarray(addresses)[np.asarray(mask, dtype=bool)].astype(np.uint64)
        place = np.searchsorted(starts, live, side="right") - 1
        inside = (place >= 0) & (live + np.uint64(item_size) <= ends[np.maximum(place, 0)])
        if not inside.all():
            raise OutOfBoundsError(
                f"{self.kernel} {verb} {(~inside).sum()} of {inside.size} elements outside of its "
                "tensors"
            )

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check("reads", addresses, mask, np.dtype(dtype).itemsize)
        return self._operations.load(addresses, mask, other, dtype)

    def store(self, addresses: Any, values: Any, mask: Any) -> Any:
        self._check("writes", addresses, mask, np.asarray(values).itemsize)
        return self._operations.store(addresses, values, mask)

    def atomic_rmw(self, operation: Any, addresses: Any, values: Any, mask: Any, order: Any) -> Any:
        self._check("updates", addresses, mask, np.asarray(values).itemsize)
        return self._operations.atomic_rmw(operation, addresses, values, mask, order)

    def atomic_cas(self, addresses: Any, expected: Any, values: Any, order: Any) -> Any:
        everywhere = np.ones_like(addresses, dtype=bool)
        self._check("updates", addresses, everywhere, np.asarray(values).itemsize)
        return self._operations.atomic_cas(addresses, expected, values, order)


@contextlib.contextmanager
def checked_memory() -> Iterator[None]:
    """Check every access of the kernels that run in this context. Raises OutOfBoundsError there."""
    memory = _CheckedMemory(interpreter._interpreter)
    launch = interpreter.GridExecutor.__call__

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        memory.allowed = _ranges([v for v in values if isinstance(v, torch.Tensor)])
        memory.kernel = executor.fn.__name__
        return launch(executor, *args, **kwargs)

    with (
        mock.patch.object(interpreter, "_interpreter", memory),
        mock.patch.object(interpreter.GridExecutor, "__call__", call),
    ):
        yield
