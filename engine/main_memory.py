"""How much main memory there is to take, and how many CPUs: the system's, or a control group's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")


class _Version(NamedTuple):
    """The names of a control group's files in one version of control groups."""

    limit: str
    used: str
    reclaimable: str
    """The field of memory.stat that counts pages of files which nobody has used for a while."""


_VERSIONS = (
    _Version("memory.max", "memory.current", "inactive_file"),
    _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(root: Path = _ROOT) -> int | None:
    """Return the bytes that this process may still take without swapping: the system's, or those
    of a control group that it is in (of version 1 or 2) if that is less. None if the system does
    not say. `root` is the folder that holds proc and sys.
    """
    found = []
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for group in _control_groups("memory", root):
        for version in _VERSIONS:
            # A group may have no limit ("max"), and that at the top has no files.
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((group / name).read_text()) for name in version[:2])
                found.append(max(0, limit - used + _reclaimable(group, version)))
    return min(found) if found else None


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Return the CPUs' worth of time that the control groups of this process allow; None if they
    set no quota."""
    found = []
    for group in _control_groups("cpu", root):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            found.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
            if int(quota) > 0:
                found.append(int(quota) / int(period))
    return min(found) if found else None


def _reclaimable(group: Path, version: _Version) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == version.reclaimable:
                return int(value)
    return 0


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, and of those around them.

    Within a container the path may be that outside, and the group itself be mounted at the top.
    """
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    yield from (mount, mount / controller)
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mount / controller if controllers else mount
        inner = top / path.lstrip("/")
        while inner != top and top in inner.parents:
            yield inner
            inner = inner.parent
