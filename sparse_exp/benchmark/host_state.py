"""What else happens on the host meanwhile: other programs, the clock, the hypervisor, memory."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from sparse_exp.hardware import usable_cpus
from sparse_exp.hardware.cgroups import memory_limits

_WINDOW_S = 0.5


@dataclass(frozen=True)
class HostState:
    """The host during half a second in which this process sleeps.

    Attributes:
        load_average: of the last minute.
        busy_cores: cores that other programs keep busy, among those that this process may use.
        frequency_mhz: mean clock of those cores; None where the system does not tell.
        steal: share of the time, 0..1, that a hypervisor gave to other machines.
    """

    load_average: float
    busy_cores: float
    frequency_mhz: float | None
    steal: float

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
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
    """Watches the time that a hypervisor gives to other machines, from the creation of this object on."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    def share(self) -> float:
        """Share of the host's time, 0..1; 0 where the system does not tell."""
        now, before = psutil.cpu_times(), self._before
        total = sum(now[: len(before)]) - sum(before)
        return (getattr(now, "steal", 0.0) - getattr(before, "steal", 0.0)) / total if total > 0 else 0.0


def free_memory_share() -> float:
    """Share of the memory that is free, 0..1: the host's, or a container's if less of its own is free."""
    memory = psutil.virtual_memory()
    of_limits = (limit.left / limit.most for limit in memory_limits() if limit.most)
    return min([memory.available / memory.total, *of_limits])


def _own_cpus(count: int) -> list[int]:
    return [cpu for cpu in usable_cpus() if cpu < count]


def _frequency() -> float | None:
    try:
        clocks = psutil.cpu_freq(percpu=True)
    except (OSError, NotImplementedError):
        return None
    own = [clocks[cpu].current for cpu in _own_cpus(len(clocks or ()))]
    return round(sum(own) / len(own)) if own and all(own) else None
