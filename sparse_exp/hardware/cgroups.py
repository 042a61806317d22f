"""What the control groups (cgroups) of this process leave it of memory and CPU time.

Version 2 has one tree of groups, version 1 a tree for each controller; both are read as Linux documents them
(https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html,
https://docs.kernel.org/scheduler/sched-bwc.html). A group's limit also holds for the groups in it, so those
around the process's own are read, too. Inside a container often only the root is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Names of a group's limit, its use, and the parts of that which are a cache of files.
_MEMORY_V2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
_MEMORY_V1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)


@dataclass(frozen=True)
class MemoryLimit:
    """The memory of a group, in bytes.

    Attributes:
        most: the limit.
        used: by all processes of the group, with the files that the kernel caches for them.
        cached: the part of that which is a cache of files; the kernel drops it before it refuses anything.
    """

    most: int
    used: int
    cached: int

    @property
    def left(self) -> int:
        """What may be taken in addition, at least 0."""
        return max(0, self.most - self.used + self.cached)


def memory_limits() -> list[MemoryLimit]:
    """Every limit on this process's memory; empty where there is none."""
    limits = []
    for group in _groups("memory"):
        for limit, usage, caches in (_MEMORY_V2, _MEMORY_V1):
            most, used = _read(group / limit), _read(group / usage)
            if most.isdigit() and used.isdigit():  # "max" is no limit
                stat = dict(line.split()[:2] for line in _read(group / "memory.stat").splitlines())
                cached = sum(int(stat.get(name, 0)) for name in caches)
                limits.append(MemoryLimit(int(most), int(used), cached))
    return limits


def free_memory() -> int:
    """Bytes that this process can still get before it is refused more or killed.

    The least of the host's available memory and of what the limits of this process's groups leave.
    """
    return min([int(psutil.virtual_memory().available), *(limit.left for limit in memory_limits())])


def cpu_quota() -> float | None:
    """CPU time that this process may use, in cores; None where there is no limit.

    A quota is in microseconds of each period: ``200000`` of ``100000`` are 2 cores.
    """
    quotas = []
    for group in _groups("cpu"):
        version_1 = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        for text in (_read(group / "cpu.max"), version_1):
            words = text.split()
            if len(words) == 2 and words[0].isdigit():  # "max" and -1 are no limit
                quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def throttled_seconds() -> float:
    """Seconds so far in which a quota kept this process's groups from running; 0 where there is none."""
    found = [0.0]
    for group in _groups("cpu"):
        stat = dict(line.split()[:2] for line in _read(group / "cpu.stat").splitlines())
        found.append(int(stat.get("throttled_usec", 0)) / 1e6)  # version 2
        found.append(int(stat.get("throttled_time", 0)) / 1e9)  # version 1
    return max(found)


def _groups(controller: str) -> Iterator[Path]:
    """Directories of this process's groups and of those around them, some of them twice."""
    yield from (_GROUPS, _GROUPS / controller)
    for line in _read(_OWN_GROUP).splitlines():  # 0::/a/b (version 2), 4:cpu,cpuacct:/a/b (version 1)
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for root in (_GROUPS / controllers, _GROUPS / controller):
            group = root / path.strip("/")
            while group != root:
                yield group
                group = group.parent


def _read(path: Path) -> str:
    """The text of a file; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
