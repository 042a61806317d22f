"""What the processes of one training say to each other."""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy

from sparse_exp.distributed import collectives
from sparse_exp.distributed.collectives import Disconnected
from sparse_exp.errors import StageFailed

_T = TypeVar("_T")


pipes: list[Connection[Any, Any]] = []  # of the first process one to each other; of those one to the first


def make_fabric() -> Fabric:
    """The Fabric of this process: of a CPU or the GPU that is its own."""
    if collectives.size() == 1:
        return Fabric(devices=1)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    fabric = Fabric(
        accelerator=accelerator, devices=collectives.size(), strategy=DDPStrategy(), plugins=[_Place()]
    )
    fabric.launch()
    return fabric


def told_by_first(value: _T) -> _T:
    """What the first process has, in all of them; the others wait for it as long as it takes.

    Raises:
        Disconnected: a process is gone.
    """
    try:
        if collectives.rank():
            told: _T = pickle.loads(pipes[0].recv_bytes())
            return told
        message = pickle.dumps(value) if pipes else b""
        for pipe in pipes:
            pipe.send_bytes(message)
    except (OSError, EOFError) as error:
        raise Disconnected from error
    return value


def require_equal(model: torch.nn.Module, epoch: float) -> None:
    """Hold all processes to the same weights and statistics.

    Raises:
        StageFailed: they have drifted apart.
    """
    names = collectives.differing(model.state_dict())
    if names:
        raise StageFailed(
            f"After epoch {epoch:g} the processes of the training differ in {len(names)} tensors, such as "
            f"{names[0]}. Train with trainer.devices=1."
        )


class _Place(LightningEnvironment):
    """Where a process stands among all, for Fabric: they are there already, and know each other."""

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
