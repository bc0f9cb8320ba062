"""What the system lets this user have: open files, of which connections get what is left, and
threads. Too little is said in one line at the start."""

from __future__ import annotations

import os
import resource
import threading

from ...engine.errors import ConfigurationError

MIN_DESCRIPTORS = 128
"""Descriptors without which the server does not start."""
SPARE_THREADS = 32
"""Threads that a server needs, beside one for each CPU."""
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


def check_threads() -> None:
    """Raise ConfigurationError unless as many threads can be started as a server needs."""
    needed = SPARE_THREADS + (os.cpu_count() or 1)
    enough = threading.Event()
    threads = [threading.Thread(target=enough.wait, daemon=True) for _ in range(needed)]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError as error:  # what Python raises for EAGAIN
        raise ConfigurationError(
            f"only {len(started)} threads can be started, and {needed} are needed: raise the limit "
            "of processes, `ulimit -u`, TasksMax= or the container's pids limit"
        ) from error
    finally:
        enough.set()
        for thread in started:
            thread.join()


def max_connections() -> int:
    """Return how many connections this process has descriptors for, beside those it has open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = _MOST
    in_use = len(os.listdir("/dev/fd"))
    return max(1, limit - in_use - max(RESERVE, limit // 8) - PROBE_CONNECTIONS)
