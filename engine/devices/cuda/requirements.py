"""What a GPU and a Triton must have for the kernels, checked before anything is loaded."""

from __future__ import annotations

import re

from ...errors import ConfigurationError

OLDEST_CAPABILITY = (8, 0)
"""Ampere: older GPUs lack asynchronous copies to shared memory and products of bfloat16, and the
kernels would compile for half a minute each into code that spills."""
_BLACKWELL = (10, 0)
_RIGHT_ON_BLACKWELL = (3, 7, 1)
_WRONG_TRITON = (3, 7, 0)


def check_gpu(name: str, capability: tuple[int, int], triton_version: str) -> str | None:
    """Raise ConfigurationError if the kernels cannot run on this GPU with this Triton; return a
    warning if they may compute wrong results, else None.

    Triton 3.7.0 computes wrong products on compute capability 10.0 and later, and older releases
    lack the fence between copies to shared memory and the tensor cores that read them there
    (triton-lang/triton#9610; 3.7.1 has it).
    """
    major, minor = capability
    if capability < OLDEST_CAPABILITY:
        raise ConfigurationError(
            f"{name} has compute capability {major}.{minor}, and the kernels need 8.0 (Ampere) or "
            "later: use --device cpu"
        )
    version = tuple(int(part) for part in re.findall(r"\d+", triton_version)[:3])
    if version == _WRONG_TRITON:
        raise ConfigurationError("Triton 3.7.0 makes wrong code: install 3.7.1 or later, or 3.6")
    if capability >= _BLACKWELL and version < _RIGHT_ON_BLACKWELL:
        return (
            f"Triton {triton_version} may compute wrong results on {name} (compute capability "
            f"{major}.{minor}): install triton 3.7.1 or later"
        )
    return None
