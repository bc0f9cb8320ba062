"""What control groups of both versions leave to a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.engine.main_memory import available_memory, cpu_quota

MEMINFO = "MemTotal: 1000 kB\nMemAvailable:  800 kB\n"
UNLIMITED = str(2**63 - 4096)  # what version 1 says without a limit


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, limit: str, used: str, version: int, inactive: int = 0) -> dict[str, str]:
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    field = {1: "total_inactive_file", 2: "inactive_file"}[version]
    return {
        f"sys/fs/cgroup/{folder}memory.{names[0]}": f"{limit}\n",
        f"sys/fs/cgroup/{folder}memory.{names[1]}": f"{used}\n",
        f"sys/fs/cgroup/{folder}memory.stat": f"anon 5\n{field} {inactive}\n",
    }


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 800 * 1024),
        (group("", "5000", "1000", 2), 4000),
        (group("", "max", "1000", 2), 800 * 1024),
        (group("", "5000", "4800", 2, inactive=700), 900),  # pages of files are given back
        (group("", "5000", "6000", 2), 0),
        (group("memory/", "7000", "1000", 1), 6000),  # mounted at the top, as in a container
        (group("memory/", UNLIMITED, "1000", 1), 800 * 1024),
        (group("memory/", "7000", "6900", 1, inactive=50), 150),
        # A service, and the slice around it, on a machine that is no container.
        (
            {
                "proc/self/cgroup": "0::/system.slice/quire.service\n",
                **group("system.slice/quire.service/", "max", "10", 2),
                **group("system.slice/", "3000", "1000", 2),
            },
            2000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/jobs/one\n3:cpu,cpuacct:/other\n0::/\n",
                **group("memory/jobs/one/", "900", "100", 1),
                **group("memory/jobs/", UNLIMITED, "100", 1),
                **group("memory/other/", "1", "1", 1),
            },
            800,
        ),
        ({"proc/self/cgroup": "4:memory:/docker/abc\n", **group("memory/", "900", "100", 1)}, 800),
        ({"proc/self/cgroup": "0::/../outside\n"}, 800 * 1024),
    ],
)
def test_memory_is_the_least_that_any_control_group_leaves(
    tmp_path: Path, files: dict[str, str], available: int
) -> None:
    assert available_memory(machine(tmp_path, files)) == available


def test_without_any_source_nothing_is_known(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None and cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "50000",
            },
            3.0,
        ),
    ],
)
def test_the_quota_of_cpus_is_read_in_both_versions(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(machine(tmp_path, files)) == quota
