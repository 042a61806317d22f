"""How much memory this process uses and can still get, and which errors mean that there is none left."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from sparse_exp.errors import StageFailed
from sparse_exp.hardware.cgroups import free_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "could not create a primitive",  # of oneDNN, when it cannot allocate
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python, CUDA, or torch's allocator on the CPU raised the error."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MESSAGES)


@contextmanager
def no_memory_left(what: str, do: str) -> Iterator[None]:
    """Say in one line that memory ran out within the block, on whatever device.

    Args:
        what: that needs memory, at the beginning of a sentence.
        do: what makes it need less, without a full stop.

    Raises:
        StageFailed: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise StageFailed(f"{what} ran out of memory. {do}, or free some memory.") from error


def used_bytes(device: torch.device) -> int:
    """Bytes that this process uses now: resident memory on a CPU, allocated tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    # The C library keeps freed memory. A step that takes its memory from there would seem to need none.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # exists only in glibc; other libraries keep less
    return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still get before it is refused more or killed.

    On a CPU, see `sparse_exp.hardware.cgroups.free_memory`. On a GPU, its free memory and the memory
    that torch has reserved but does not use.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held)
    return free_memory()


def reset_peak(device: torch.device) -> None:
    """Begin to measure the highest use; see `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5")  # Linux: VmHWM starts again at the current use


def peak_bytes(device: torch.device) -> int | None:
    """The highest use in bytes since `reset_peak`; None where it is not known.

    It is read from Linux's ``/proc``. Where ``clear_refs`` cannot be written, it is the highest use since the
    process began, which is never too little.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
