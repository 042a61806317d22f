"""How much memory a piece of work takes, how much there is, and what running out of it looks like."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Of a cgroup: its limit, what it uses, and what of that is a cache of files that can be dropped.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SAID = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "could not create a primitive",  # oneDNN, when it cannot allocate
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, CUDA's, or that of torch's CPU allocator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


def used_bytes(device: torch.device) -> int:
    """What this process holds now: resident memory on a CPU, allocated tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _give_back()
    return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> int:
    """What this process could take in addition before something refuses or kills it.

    On a CPU the least of the host's available memory and of what the limits of this process's
    cgroups (versions 1 and 2) leave; on a GPU its free memory and what torch holds unused.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held)
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def reset_peak(device: torch.device) -> None:
    """Begin to watch the highest use; see `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5")  # Linux: VmHWM starts again from the present use


def peak_bytes(device: torch.device) -> int | None:
    """The highest use since `reset_peak`, as `used_bytes` counts; None where it is not known.

    Without a Linux ``/proc`` there is nothing to read. Where ``clear_refs`` may not be written the
    highest use of the process's whole life is returned, which is never too little.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _give_back() -> None:
    """Let the C library return what was freed: it keeps it, and a step in it would seem to need nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc; others have none, and keep less


def _left_in_groups() -> Iterator[int]:
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
