"""What the processes of one training say to each other besides numbers.

`sparse_exp.training.processes` starts the processes and fills `pipes`. The training loop asks here for its
Fabric, takes over what the first process has decided, and sees to it that all weights stay equal.
"""

from __future__ import annotations

import pickle
from inspect import signature
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from sparse_exp.distributed import collectives
from sparse_exp.distributed.collectives import Disconnected
from sparse_exp.errors import StageFailed

_T = TypeVar("_T")

_RENAMED = "forward_sync_buffers"  # in torch 2.14
_BUFFERS = _RENAMED if _RENAMED in signature(DistributedDataParallel).parameters else "broadcast_buffers"
_EQUAL: dict[str, Any] = {_BUFFERS: False, "init_sync": False}  # models are equal from the start, and stay so

pipes: list[Connection[Any, Any]] = []
"""Of the first process one to each other process; of each other process one to the first; alone, none."""


def make_fabric(device: torch.device) -> Fabric:
    """The Fabric of this process.

    Args:
        device: the CPU or this process's own GPU; where processes train together, the GPU of its number.
    """
    if collectives.size() == 1:
        return Fabric(accelerator=device.type, devices=[device.index or 0] if device.type == "cuda" else 1)
    fabric = Fabric(
        accelerator=device.type,
        devices=collectives.size(),
        strategy=DDPStrategy(**_EQUAL),
        plugins=[_ProcessGroupEnvironment()],
    )
    fabric.launch()
    return fabric


def broadcast_from_first(value: _T) -> _T:
    """The first process's value, in every process; the others wait for it, however long it takes.

    Args:
        value: can be pickled; that of the other processes is ignored.

    Raises:
        Disconnected: a process is gone.
    """
    try:
        if collectives.rank():
            received: _T = pickle.loads(pipes[0].recv_bytes())
            return received
        message = pickle.dumps(value) if pipes else b""
        for pipe in pipes:
            pipe.send_bytes(message)
    except (OSError, EOFError) as error:
        raise Disconnected from error
    return value


def require_equal(model: torch.nn.Module, epoch: float) -> None:
    """Refuse to go on where weights or statistics are not the same in all processes.

    Args:
        model: this process's.
        epoch: for the message.

    Raises:
        StageFailed: they have drifted apart.
    """
    names = collectives.differing_tensors(model.state_dict())
    if names:
        raise StageFailed(
            f"After epoch {epoch:g} the processes of the training differ in {len(names)} tensors, such as "
            f"{names[0]}. Train with trainer.devices=1."
        )


class _ProcessGroupEnvironment(LightningEnvironment):
    """Tells Fabric that the processes run already and that their group is set up."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return collectives.size()

    def global_rank(self) -> int:
        return collectives.rank()

    def local_rank(self) -> int:
        return collectives.rank()

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass
