"""The limit of open files: it is raised at the start, and connections get what it leaves."""

from __future__ import annotations

import os
import resource

from ...engine.errors import ConfigurationError

MIN_DESCRIPTORS = 128
"""Descriptors without which the server does not start."""
RESERVE = 48
"""Descriptors that connections leave free for everything else; one in eight, if that is more."""
PROBE_CONNECTIONS = 8
"""Connections beyond the bound, which only the probes are answered on."""
_MOST = 2**20  # if there is no limit


def raise_descriptor_limit() -> int:
    """Raise this process's limit of open descriptors as far as it may, and return it; processes
    that it starts inherit it. Raises ConfigurationError if it is too low to serve."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # some systems bound it below what they say
            pass
    if soft != resource.RLIM_INFINITY and soft < MIN_DESCRIPTORS:
        raise ConfigurationError(
            f"only {soft} open files are allowed, and at least {MIN_DESCRIPTORS} are needed: raise "
            "the limit, for example by `ulimit -n 65536` or LimitNOFILE="
        )
    return _MOST if soft == resource.RLIM_INFINITY else soft


def max_connections() -> int:
    """Return how many connections this process has descriptors for, beside those it has open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = _MOST
    in_use = len(os.listdir("/dev/fd"))
    return max(1, limit - in_use - max(RESERVE, limit // 8) - PROBE_CONNECTIONS)
