"""How much memory a piece of work takes, how much there is, and what running out of it looks like."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from sparse_exp.hardware.cgroups import memory_limits

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
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
    return min([int(psutil.virtual_memory().available), *(limit.left for limit in memory_limits())])


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
