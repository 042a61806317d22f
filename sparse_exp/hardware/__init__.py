"""Facts about the host's CPU; `sparse_exp.hardware.targets` compares them with what a target asks for."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from sparse_exp.hardware.cgroups import cpu_quota

_CPUINFO = Path("/proc/cpuinfo")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
# Each of the kernel's flags stands for the instruction set.
_ISA_FLAGS = {
    "avx2": {"avx2"},
    "avx512": {"avx512f"},
    "vnni": {"avx512_vnni", "avx_vnni"},
    "bf16": {"avx512_bf16", "amx_bf16"},
    "amx": {"amx_tile"},
}


@dataclass(frozen=True)
class HostFacts:
    """The machine that a number was measured on.

    Attributes:
        cpu: model name of the CPU.
        physical_cores: cores of the machine, without hyper-threads.
        usable_cores: logical cores that this process may run on.
        memory_gb: main memory, in units of 1e9 bytes.
        isa: those of avx2, avx512, vnni, bf16 and amx that the CPU has.
        os: operating system and its release.
        python: version of Python.
    """

    cpu: str
    physical_cores: int
    usable_cores: int
    memory_gb: float
    isa: tuple[str, ...]
    os: str
    python: str


def host_facts() -> HostFacts:
    """Read the facts of this machine from ``/proc/cpuinfo`` and psutil."""
    cpuinfo = _read(_CPUINFO)
    return HostFacts(
        cpu=_field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        physical_cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        usable_cores=len(usable_cpus()),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        isa=isa_of(_field(cpuinfo, "flags")),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def isa_of(flags: str) -> tuple[str, ...]:
    """Instruction sets that matter to inference, in the order of `HostFacts.isa`.

    Args:
        flags: the ``flags`` line of ``/proc/cpuinfo``, words separated by spaces.
    """
    present = set(flags.split())
    return tuple(isa for isa, names in _ISA_FLAGS.items() if names & present)


def has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return "bf16" in isa_of(_field(_read(_CPUINFO), "flags"))


def usable_physical_cores() -> int:
    """Cores that this process may use at once, at least 1.

    Hyper-threads of one core count once. The process's CPU affinity and the CPU quota of a container
    are respected.
    """
    cores, quota = len(physical_cpus()), cpu_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def usable_cpus() -> set[int]:
    """Numbers of the CPUs that this process may use; of all where the system does not tell, as on macOS."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cpus() -> list[int]:
    """Numbers of the CPUs that this process may use, sorted; of a core's hyper-threads only the first."""
    cores: dict[str, int] = {}
    for cpu in sorted(usable_cpus()):
        cores.setdefault(_read(Path(_TOPOLOGY.format(cpu=cpu))).strip() or str(cpu), cpu)
    return list(cores.values())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _field(cpuinfo: str, name: str) -> str:
    """The value of the first line ``name : value``; empty if there is none."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
