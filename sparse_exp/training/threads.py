"""How many threads torch computes with in a training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparse_exp.config.schema import Experiment
from sparse_exp.hardware import usable_physical_cores


def training_threads(experiment: Experiment) -> int:
    """Threads of each training process: ``trainer.threads``, else its share of the physical cores.

    The cores are shared among the processes of this training and the jobs of a sweep that run on this
    machine. Like torch's own default, a share is at most ``OMP_NUM_THREADS``.
    """
    if experiment.trainer.threads is not None:
        return experiment.trainer.threads
    launcher = experiment.launcher
    # A cluster gives each job cores of its own.
    jobs_here = launcher.name == "joblib" or (launcher.name == "ray" and experiment.ray.address is None)
    share = usable_physical_cores() // (experiment.trainer.devices * (launcher.jobs if jobs_here else 1))
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(share, int(limit) if limit.isdigit() else share))


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads within the block.

    The number of threads decides in which order sums are added: results agree bit for bit only with the same
    number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
