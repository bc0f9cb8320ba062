"""Compile a list of kernels, and report it: it takes seconds, once per installation."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from tqdm import tqdm

from .kernel import Kernel, Signature
from .region import compile_region

logger = logging.getLogger("quire.kernels")

Task = tuple[Kernel, Signature]
"""A kernel, and what it is to be compiled for."""


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
