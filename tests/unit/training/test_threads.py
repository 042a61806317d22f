"""How many threads a training gets."""

from __future__ import annotations

import pytest
import torch

from sparse_exp.config.schema import Experiment, LauncherConfig, RayConfig, TrainerConfig
from sparse_exp.training import threads as module


@pytest.mark.parametrize(
    ("given", "count", "jobs", "limit", "threads"),
    [
        (None, 1, 1, None, 12),
        (None, 2, 3, None, 2),
        (None, 4, 8, None, 1),
        (None, 2, 1, "4", 4),
        (7, 2, 3, "1", 7),
    ],
)
def test_threads_are_the_cores_shared_out(monkeypatch, given, count, jobs, limit, threads):
    monkeypatch.setattr(module, "usable_physical_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if limit:
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
    trainer = TrainerConfig(batch_size=8, devices=count, threads=given)
    experiment = Experiment(trainer=trainer, launcher=LauncherConfig("joblib", jobs))
    assert module.training_threads(experiment) == threads


@pytest.mark.parametrize(
    ("launcher", "address", "threads"),
    [("ray", None, 3), ("ray", "10.0.0.1:6379", 12), ("slurm", None, 12)],
)
def test_jobs_on_other_machines_do_not_share_these_cores(monkeypatch, launcher, address, threads):
    monkeypatch.setattr(module, "usable_physical_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    experiment = Experiment(launcher=LauncherConfig(launcher, 4), ray=RayConfig(address))
    assert module.training_threads(experiment) == threads


def test_threads_are_given_back():
    before, within = torch.get_num_threads(), []

    def fail() -> None:
        with module.using_threads(before + 1):
            within.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (within, torch.get_num_threads()) == ([before + 1], before)
