"""Limits of this process's cgroups, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


# Of a cgroup: its limit, what it uses, and what of that is a cache of files that can be dropped.
_V2 = ("memory.max", "memory.current", "inactive_file")


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def memory_left() -> Iterator[int]:
    """What each limit on this process leaves, in bytes; a cache of files counts as left."""
    for folder in _groups():
        for limit, usage, cache in (_V2, _V1):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                yield max(0, most - used + _cached(folder / "memory.stat", cache))


def _groups() -> Iterator[Path]:
    """This process's cgroups and those around them; in a container often only the root is seen."""
    yield from (_GROUPS, _GROUPS / "memory")
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # 0::/a/b (version 2), 4:memory:/a/b (version 1)
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            folder = _GROUPS / controllers / path.strip("/")
            while folder not in (_GROUPS, _GROUPS / "memory"):
                yield folder
                folder = folder.parent


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _cached(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
