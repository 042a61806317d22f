"""Which device a training computes on, and what it can do.

Each decision takes the part of ``torch.cuda`` that it asks, so that it can be tested where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from sparse_exp.errors import ConfigError, expected

_AMPERE = (8, 0)  # the compute capability from which GPUs have bfloat16 and TF32


def choose_device(wanted: str = "auto", *, rank: int = 0, cuda: Any = torch.cuda) -> torch.device:
    """The device of a process of a training.

    Args:
        wanted: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, or one GPU such as ``cuda:1``.
        rank: number of the process among those that train together; each has a GPU of its own.
        cuda: what is asked for GPUs.

    Raises:
        ConfigError: this machine has no such GPU.
    """
    gpus = cuda.device_count() if cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return torch.device("cpu")
    _, named, index = wanted.partition(":")
    number = int(index) if named else rank
    if number >= gpus:
        there = f"one of this machine's {gpus} GPUs, cuda:0 to cuda:{gpus - 1}" if gpus else "auto or cpu"
        why = "" if gpus else "This machine has no GPU that torch can use. "
        raise ConfigError(expected("trainer.device", there, wanted, f"{why}Set trainer.device=auto."))
    return torch.device("cuda", number)


def has_tensor_cores(device: torch.device, *, cuda: Any = torch.cuda) -> bool:
    """Whether a GPU multiplies bfloat16 and TF32 in hardware; False for a CPU."""
    return device.type == "cuda" and tuple(cuda.get_device_capability(device)) >= _AMPERE


def processes_on(device: torch.device, devices: int) -> int:
    """How many processes of a training have memory and cores of their own, as GPUs have.

    Args:
        device: of one of them.
        devices: processes that train together; on CPUs they share the machine.
    """
    return devices if device.type == "cuda" else 1
