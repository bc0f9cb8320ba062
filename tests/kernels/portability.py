"""Which GPUs each kernel fits: registers, spills and shared memory by architecture, as a table.

    PYTHONPATH=tests/types python tests/kernels/portability.py > table.md

compiles every launch of launches.py for every architecture with the installed Triton, which takes
minutes. docs/portability.md has the table of each release that is supported.
"""

import sys

import triton
from launches import LAUNCHES, compiled

SHARED_LIMITS = {
    80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376,
}  # fmt: skip
"""Bytes of shared memory that one program may have, by compute capability."""


def cell(name: str, arch: int) -> str:
    """Return the most registers of a launch's kernels, the bytes that they spill if they do, and
    the most shared memory in KB; in bold if that is more than the GPU has."""
    try:
        kernels = compiled(name, arch)
    except Exception as error:
        return f"**{type(error).__name__}**"
    spills = sum(kernel.spills for kernel in kernels)
    shared = max(kernel.shared for kernel in kernels)
    spilled = f" ({spills} B spilled)" if spills else ""
    memory = f"{shared / 1000:.0f}" if shared <= SHARED_LIMITS[arch] else f"**{shared / 1000:.0f}**"
    return f"{max(kernel.registers for kernel in kernels)}{spilled}, {memory}"


def table() -> str:
    """Return the table as Markdown, a row a launch and a column an architecture."""
    lines = [
        f"| launch (triton {triton.__version__}) |" + "".join(f" sm_{a} |" for a in SHARED_LIMITS)
    ]
    lines.append("|---|" + "---|" * len(SHARED_LIMITS))
    for name in LAUNCHES:
        cells = []
        for arch in SHARED_LIMITS:
            cells.append(cell(name, arch))
            print(f"{name}, sm_{arch}: {cells[-1]}", file=sys.stderr, flush=True)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
