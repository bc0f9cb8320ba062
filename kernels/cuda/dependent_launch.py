"""Programmatic dependent launch: a kernel's programs start while the last ones of the kernel before
it still run, and wait for its end on the device (sm_90 and later).

Without it, a kernel in a stream or a graph begins only once the one before it has ended, which
leaves the device idle for a microsecond or two. Each kernel that is launched so calls
`begin_program` before it reads or writes anything. So none ends before the one that it follows, and
a chain of them keeps the order of the stream.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import triton
import triton.language as tl

OLDEST_CAPABILITY = 90
"""Compute capability (90 for 9.0) of the oldest GPUs that can."""


@triton.jit
def begin_program(PDL: tl.constexpr):
    """Let the next kernel's programs start, then wait until the kernel before this one has ended
    and what it wrote is visible. Does nothing unless PDL."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def launch_options(pdl: bool) -> dict[str, Any]:
    """Return the options with which a kernel is launched so, or as usual."""
    return {"launch_pdl": True} if pdl else {}
