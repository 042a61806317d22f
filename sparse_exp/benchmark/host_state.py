"""What else happens on the host: other programs, the clock, the hypervisor, memory."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

_WINDOW_S = 0.5
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class HostState:
    """The host within half a second in which this process sleeps.

    Attributes:
        load_average: of the last minute.
        busy_cores: cores that others keep busy, among those that this process may use.
        frequency_mhz: of those cores, on average; None where the system does not tell.
        steal: share of the time, 0..1, that a hypervisor gave to others.
    """

    load_average: float
    busy_cores: float
    frequency_mhz: float | None
    steal: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def look_around() -> HostState:
    """Look at the host for half a second."""
    steal = Steal()
    psutil.cpu_percent(percpu=True)  # begins the window
    time.sleep(_WINDOW_S)
    shares = psutil.cpu_percent(percpu=True)
    busy = sum(shares[cpu] for cpu in _own_cpus(len(shares))) / 100
    return HostState(round(os.getloadavg()[0], 2), round(busy, 2), _frequency(), round(steal.share(), 4))


class Steal:
    """Share of the host's time that a hypervisor gave to others, from now on."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    def share(self) -> float:
        """Since this object was made, 0..1; 0 where the system does not tell."""
        now, before = psutil.cpu_times(), self._before
        total = sum(now[: len(before)]) - sum(before)
        return (getattr(now, "steal", 0.0) - getattr(before, "steal", 0.0)) / total if total > 0 else 0.0


def free_memory_share() -> float:
    """Share of the memory that is free, 0..1; that of the container where it has a limit of its own."""
    memory = psutil.virtual_memory()
    shares = [memory.available / memory.total]
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        shares.append(1 - (used - int(cached.get("file", 0))) / limit)
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return min(shares)


def _own_cpus(count: int) -> list[int]:
    return [cpu for cpu in os.sched_getaffinity(0) if cpu < count]


def _frequency() -> float | None:
    try:
        clocks = psutil.cpu_freq(percpu=True)
    except (OSError, NotImplementedError):
        return None
    own = [clocks[cpu].current for cpu in _own_cpus(len(clocks or ()))]
    return round(sum(own) / len(own)) if own and all(own) else None
