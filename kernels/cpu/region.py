"""One parallel region in which threads go through phases of items.

A phase is a row of a table: which kernel, on which work, how many items, and the kernel's `layer`
and `rows`. Threads take items, or chunks of them, as they get free:

    phase 0   item 0  item 1  item 2 ...      each taken by one thread: kernel(item, ...)
              ───────── all done ─────────
    phase 1   item 0  item 1 ...

A counter per phase gives out its items, another counts those that are done. A phase begins when all
items of the one before are done, which threads see from the counter. So a step pays for waking its
threads once, not for each phase; and a thread that has lost its core, to the HTTP process for
instance, holds up nobody unless it has taken an item.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from tqdm import tqdm

from .kernel import Kernel, Packed, Signature, Work, only_process
from .numbers import FAST, PARALLEL, fetch_add, load, yield_core

logger = logging.getLogger("quire.kernels")

Task = tuple[Kernel, Signature]
"""A kernel, and what it is to be compiled for."""

LINE = 16
"""Counters apart: two cache lines, so that they never share one."""
SPINS = 500
"""How often a thread looks for a phase's end before it offers its core to others."""


class Phase(NamedTuple):
    """A row of the table."""

    kernel: int
    """The address of the kernel's machine code."""
    work: int
    """The address of the words that the kernel reads: see `kernel.Packed`."""
    items: int
    layer: int
    rows: int
    chunk: int
    """Maximum items that a thread takes at once. Items of products that follow each other are one
    piece of memory, which a processor fetches ahead; of others a thread takes one (0 or 1)."""


def launch(kernel: Kernel, work: Work, items: int, rows: int, num_threads: int) -> None:
    """Run one kernel for all items of one phase."""
    run_calls([((kernel, work), items)], rows, num_threads)


def run_calls(
    calls: Sequence[tuple[tuple[Kernel, Work], int]], rows: int, num_threads: int
) -> None:
    """Run kernels on works, one phase after the other: each with its number of items."""
    packed = [Packed(work) for (_, work), _ in calls]  # until the kernels have run
    phases = [
        (kernel.address(work), words.address, items, 0, rows, kernel.chunk)
        for ((kernel, work), items), words in zip(calls, packed, strict=True)
    ]
    run_phases(np.array(phases, dtype=np.int64), num_threads)


def run_phases(phases: np.ndarray[Any, Any], num_threads: int) -> None:
    """Run phases, an int64 array whose rows are as `Phase`, one after the other."""
    counters = np.zeros(len(phases) * 2 * LINE, dtype=np.int64)
    run_region(phases, counters, num_threads)


def compile_region() -> None:
    """Compile the region, or load it from the cache on disk."""
    with only_process("region"):
        run_phases(np.empty((0, len(Phase._fields)), dtype=np.int64), 1)


def is_compiled(tasks: Sequence[Task]) -> bool:
    """Return whether this installation has compiled all of these for this processor."""
    return all(kernel.is_compiled(signature) for kernel, signature in tasks)


def compile_all(tasks: Sequence[Task]) -> None:
    """Compile kernels, or load those that are compiled, and the region that runs them.

    If any has to be compiled, say so in the log, and show a progress bar on a terminal.
    """
    silent, began = is_compiled(tasks), time.monotonic()
    if not silent:
        logger.info("compiling the CPU's kernels, once for this machine: this takes some seconds")
    # None disables the bar unless it is on a terminal.
    bar = tqdm(tasks, desc="compiling", unit=" kernels", disable=silent or None)
    for kernel, signature in bar:
        kernel.compile(signature)
    compile_region()
    if not silent:
        logger.info("the CPU's kernels are compiled, after %.1f s", time.monotonic() - began)


@njit(**PARALLEL)
def run_region(phases, counters, num_threads):
    """Run all phases in `num_threads` threads."""
    for thread in prange(num_threads):
        _take_items(phases, counters, np.int64(thread), np.int64(num_threads))


@njit(**FAST)
def _take_items(phases, counters, thread, num_threads):
    """Do one thread's share of all phases."""
    for phase in range(len(phases)):
        kernel, work, items = phases[phase, 0], phases[phase, 1], phases[phase, 2]
        layer, rows, chunk = phases[phase, 3], phases[phase, 4], phases[phase, 5]
        taken, done = 2 * LINE * phase, 2 * LINE * phase + LINE
        # 1. Take items while there are any: a chunk, but at most half of what would be this
        #    thread's share of those that are left, so that all threads end at the same time. The
        #    look at the counter also saves the others its cache line, which every addition takes
        #    away from them.
        left = items - load(counters, taken)
        while left > 0:
            some = max(min(chunk, left // (2 * num_threads)), 1)
            begin = fetch_add(counters, taken, some)
            end = min(begin + some, items)
            for item in range(begin, end):
                _call(kernel, work, item, layer, rows, thread)
            if begin < end:
                fetch_add(counters, done, end - begin)
            left = items - load(counters, taken)
        # 2. Wait for the items that others have taken: spinning, since a wake-up takes longer
        #    than most items, but not in the way of whoever needs this core.
        spins = 0
        while load(counters, done) < items:
            spins += 1
            if spins > SPINS:
                yield_core()


@intrinsic
def _call(typing_context, kernel, work, item, layer, rows, thread):
    """Call a kernel for one item."""

    def generate(context, builder, signature, arguments):
        kernel, work, item, layer, rows, thread = arguments
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word, word, word, word.as_pointer()])
        function = builder.inttoptr(kernel, kind.as_pointer())
        pointer = builder.inttoptr(work, word.as_pointer())
        builder.call(function, [item, layer, rows, thread, pointer])
        return context.get_dummy_value()

    word = types.int64
    return types.void(*[word] * 6), generate
