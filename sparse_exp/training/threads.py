"""How many threads torch computes with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparse_exp.config.schema import Experiment
from sparse_exp.hardware import usable_physical_cores


def training_threads(experiment: Experiment) -> int:
    """Threads of each training process: ``trainer.threads``, or the cores shared out among all that run.

    Like torch's own choice this respects ``OMP_NUM_THREADS``.
    """
    if experiment.trainer.threads is not None:
        return experiment.trainer.threads
    most = os.environ.get("OMP_NUM_THREADS", "")
    share = usable_physical_cores() // (experiment.trainer.devices * _jobs_here(experiment))
    return max(1, min(share, int(most) if most.isdigit() else share))


def _jobs_here(experiment: Experiment) -> int:
    """Jobs of a sweep that share this machine; a cluster gives each its own cores."""
    launcher = experiment.launcher
    here = launcher.name == "joblib" or (launcher.name == "ray" and experiment.ray.address is None)
    return launcher.jobs if here else 1


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads for a while.

    Sums are added up in another order with another number: results agree bit for bit only with equal ones.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
