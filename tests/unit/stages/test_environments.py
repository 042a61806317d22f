"""Each record says which code, packages and host it was made with."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_exp import experiment as experiments
from sparse_exp.files import write_text
from sparse_exp.runs.directory import Run
from sparse_exp.stages.base import SweepMember


@pytest.fixture
def on(monkeypatch):
    """A function that lets what follows happen on a host, with a package."""

    def move(host: str, package: str = "torch==2") -> None:
        monkeypatch.setattr(experiments, "current", lambda _: {"host": {"cpu": host}})
        monkeypatch.setattr(experiments, "packages", lambda: [package])

    return move


def environments(run: Run) -> dict[str, tuple[str, str]]:
    """Host and package of each stage, as its record says."""
    found = {name: run.environments[record.conditions] for name, record in run.records.items()}
    return {name: (each["host"]["cpu"], *each["packages"]) for name, each in found.items()}


def test_finished_stages_keep_theirs_when_a_run_goes_on_elsewhere(done, go, on):
    on("old")
    go(stages=["fetch", "plan"])
    on("new")
    go(stages=["fetch", "plan", "train"])  # which lets the start be fetched
    run = Run.read(Path("run"))
    assert environments(run) == dict.fromkeys(["fetch", "plan", "train"], ("new", "torch==2"))
    on("new", "torch==3")
    manifest = go()
    run = Run.read(Path("run"))
    assert environments(run) == {
        **dict.fromkeys(["fetch", "plan", "train"], ("new", "torch==2")),
        "evaluate": ("new", "torch==3"),
    }
    assert manifest["conditions"] == {"host": {"cpu": "new"}}  # of the last start, as before
    assert Path("run/environment.txt").read_text() == "torch==3\n"


def test_what_is_done_again_is_done_here(done, go, on, start):
    on("old")
    go()
    on("new")
    write_text(start, "another")
    go()
    assert set(environments(Run.read(Path("run"))).values()) == {("new", "torch==2")}


def test_a_record_that_a_job_takes_over_brings_its_own(done, experiment, on):
    def job(number: int) -> Run:
        path = Path(f"sweep/{number}-tiny")
        experiments.run(experiment(str(path)), {}, [], SweepMember(Path("sweep").absolute(), None))
        return Run.read(path)

    on("old")
    first = job(0)
    on("new", "torch==3")
    second = job(1)
    assert {record.shared_from for record in second.records.values()} == {"0-tiny"}
    assert environments(second) == environments(first)
    assert set(environments(second).values()) == {("old", "torch==2")}
    assert len(second.environments) == 2  # and that of the job itself
