"""How much main memory there is to take."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int | None:
    """Return the bytes that this process may still take without swapping: the system's, or its
    control group's if that is less. None if the system does not say."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        found.append(int(text) - int(used.read_text()))
    return min(found) if found else None
