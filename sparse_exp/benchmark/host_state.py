"""What else happens on the host meanwhile: other programs, the clock, the hypervisor, memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from sparse_exp.hardware import usable_cpus
from sparse_exp.hardware.cgroups import memory_limits, throttled_seconds

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
    """Watches the time that a hypervisor gives to other machines, from the creation of this object on.

    Args:
        cpus: numbers of the CPUs that count; None: those that this process may use.
    """

    def __init__(self, cpus: Iterable[int] | None = None) -> None:
        self._cpus = None if cpus is None else frozenset(cpus)
        self._before = self._times()

    def share(self) -> float:
        """Share of the time of these CPUs, 0..1; 0 where the system does not tell."""
        total, steal = (now - before for now, before in zip(self._times(), self._before, strict=True))
        return steal / total if total > 0 else 0.0

    def _times(self) -> tuple[float, float]:
        """Seconds of these CPUs so far, all and stolen."""
        times = psutil.cpu_times(percpu=True)
        own = [times[cpu] for cpu in _own_cpus(len(times)) if self._cpus is None or cpu in self._cpus]
        return sum(map(sum, own)), sum(getattr(one, "steal", 0.0) for one in own)


class Throttling:
    """Watches how long a quota keeps this process from running, from the creation of this object on."""

    def __init__(self) -> None:
        self._began, self._before = time.monotonic(), throttled_seconds()

    def share(self) -> float:
        """Share of the time, 0..1."""
        passed = time.monotonic() - self._began
        return min(1.0, (throttled_seconds() - self._before) / passed) if passed > 0 else 0.0


def free_cpus(cpus: Sequence[int], count: int) -> list[int]:
    """Those of some CPUs that other programs use least, sorted; the first where all are as free.

    Args:
        cpus: numbers to choose from.
        count: how many; all where there are fewer.
    """
    shares = psutil.cpu_percent(_WINDOW_S, percpu=True)
    busy = {cpu: round(shares[cpu], -1) if cpu < len(shares) else 0.0 for cpu in cpus}  # steps of 10 %
    return sorted(sorted(cpus, key=lambda cpu: (busy[cpu], cpu))[:count])


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
