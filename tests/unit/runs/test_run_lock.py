from __future__ import annotations

import json
import logging
import multiprocessing
import os
import platform
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_exp import experiment as experiments
from sparse_exp import locks as host
from sparse_exp.config.schema import (
    DatasetConfig,
    Experiment,
    HardwareConfig,
    ModelConfig,
    PathsConfig,
    RecipeConfig,
    TrackerConfig,
)
from sparse_exp.errors import ConfigError
from sparse_exp.files import write_text
from sparse_exp.runs.directory import LOCK, MANIFEST, Run, locked
from sparse_exp.runs.past import has_died, read_run
from sparse_exp.stages.base import Outcome, SweepMember
from sparse_exp.stages.registry import STAGES
from sparse_exp.tracking import FoundRun

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_SECONDS_BETWEEN_TRIES", 0.02)
    monkeypatch.setattr(host, "_SECONDS_BEFORE_A_LINE", 0.0)
    monkeypatch.setattr(host, "default_lock_path", lambda: tmp_path / "host.lock")


def experiment(run: Path, **changes) -> Experiment:
    values = {
        "name": "tiny",
        "stages": ["report"],
        "model": ModelConfig(name="yolov5n", size="n", weights="scratch"),
        "dataset": DatasetConfig(name="digits", generator="digits", imgsz=64),
        "recipe": RecipeConfig(name="transfer", file="transfer.md"),
        "hardware": HardwareConfig(name="cpu", engines=["onnxruntime"], cores=[1]),
        "tracker": TrackerConfig(backend="none"),
        "paths": PathsConfig(output="out", run=str(run), mlflow="mlflow"),
    }
    return Experiment(**{**values, **changes})


@pytest.fixture
def running(tmp_path, monkeypatch):
    """A run in a process of its own, in the midst of its stage; (its directory, the process)."""
    run = tmp_path / "run"

    def stage(_):
        (tmp_path / "begun").touch()
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setitem(STAGES, "report", replace(STAGES["report"], run=stage))
        process = FORK.Process(target=experiments.run, args=(experiment(run), {}, []), daemon=True)
        process.start()
    while not (tmp_path / "begun").exists():
        assert process.is_alive()
        time.sleep(0.01)
    monkeypatch.setitem(STAGES, "report", replace(STAGES["report"], run=lambda _: Outcome()))
    yield run, process
    kill(process)


def kill(process) -> None:
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def status(run: Path) -> str:
    return json.loads((run / MANIFEST).read_text())["status"]


def test_a_start_without_a_tracker_leaves_the_run_as_it_was_tracked_and_untold(tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setitem(STAGES, "report", replace(STAGES["report"], run=lambda _: Outcome()))
    experiments.run(experiment(run), {}, [])
    Run.read(run).update(tracker_run_id="abc", tracker_address="http://there", told=True)
    experiments.run(experiment(run, resume=str(run)), {}, [])
    state = Run.read(run).state
    assert (state["tracker_run_id"], state["tracker_address"], state["told"]) == (
        "abc",
        "http://there",
        False,
    )


def test_the_run_of_a_process_that_is_gone_is_told_from_one_that_lives(running, tmp_path):
    run, process = running
    tracked = FoundRun("abc", {"run.directory": str(run), "host.name": platform.node()}, {})
    assert not has_died(tracked)
    kill(process)
    assert has_died(tracked)
    assert not has_died(replace(tracked, tags={"run.directory": str(tmp_path / "of another machine")}))
    elsewhere = replace(tracked, tags={"run.directory": str(run), "host.name": "another"})
    assert not has_died(elsewhere)  # it has the path of this one there
    Run.read(run).update(tracker_run_id="abc")  # a directory that both share
    assert has_died(elsewhere)
    assert not has_died(replace(tracked, tags={}))


def test_runs_that_start_in_the_same_moment_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "report", replace(STAGES["report"], run=lambda _: Outcome()))
    together = FORK.Barrier(4)

    def start() -> None:
        together.wait()
        experiments.run(experiment(tmp_path / "12-00-00-tiny"), {}, [], numbered=True)

    processes = [FORK.Process(target=start) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    names = ["12-00-00-tiny", *(f"12-00-00-tiny-{number}" for number in (2, 3, 4))]
    assert sorted(path.name for path in tmp_path.glob("12*")) == names
    for name in names:
        assert status(tmp_path / name) == "FINISHED"
        assert Run.read(tmp_path / name).config["paths"]["run"] == str(tmp_path / name)


@pytest.mark.parametrize("changes", [{"resume": True}, {"overwrite": True}, {}])
def test_a_run_that_is_worked_on_is_neither_resumed_nor_replaced(running, changes):
    run, process = running
    before = (run / MANIFEST).read_text()
    changes = {"resume": str(run)} if "resume" in changes else changes
    with pytest.raises(ConfigError) as error:
        experiments.run(experiment(run, **changes), {}, [])
    message = str(error.value)
    assert f"{run} is being worked on by process {process.pid} on " in message
    assert "\n" not in message
    assert (run / MANIFEST).read_text() == before
    assert process.is_alive()


def test_once_its_process_was_killed_a_run_is_seen_as_killed_and_can_be_resumed(running):
    run, process = running
    assert read_run(run).status == "RUNNING"
    kill(process)
    assert status(run) == "RUNNING"  # nobody was left to write it down
    assert read_run(run).status == "KILLED"
    experiments.run(experiment(run, resume=str(run)), {}, [])
    assert status(run) == "FINISHED"
    assert read_run(run).status == "FINISHED"
    assert not (run / LOCK).exists()


def test_a_killed_run_can_be_replaced(running):
    run, process = running
    kill(process)
    write_text(run / "weights" / "old.pt", "old")
    experiments.run(experiment(run, overwrite=True), {}, [])
    assert status(run) == "FINISHED"
    assert not (run / "weights").exists()


def test_a_job_of_a_sweep_waits_and_says_for_whom(running, caplog, monkeypatch):
    run, process = running
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(host.time, "sleep", lambda _: kill(process))
    member = SweepMember(run.parent, None)
    experiments.run(experiment(run, resume=str(run)), {}, [], member)
    assert f"worked on by process {process.pid}" in caplog.text
    assert status(run) == "FINISHED"


def test_who_holds_the_lock_may_run_inside_it(tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "report", replace(STAGES["report"], run=lambda _: Outcome()))
    run = tmp_path / "run"
    with locked(run, wait=False):
        experiments.run(experiment(run), {}, [])
        assert (run / LOCK).exists()  # still held
        experiments.run(experiment(run, overwrite=True), {}, [])
        assert (run / LOCK).exists()
    assert {path.name for path in run.iterdir()} >= {MANIFEST, "config.yaml"}
    assert not (run / LOCK).exists()


def test_the_lock_is_no_content_of_a_run(tmp_path):
    with locked(tmp_path / "run", wait=False):
        inode = (tmp_path / "run" / LOCK).stat().st_ino
        run = Run.create(tmp_path / "run", overwrite=False)
        write_text(run.path / "a" / "b", "")
        again = Run.create(tmp_path / "run", overwrite=True)
        assert {path.name for path in again.path.iterdir()} == {LOCK, MANIFEST}
        assert (again.path / LOCK).stat().st_ino == inode


def test_a_directory_that_was_made_for_nothing_goes_again(tmp_path):
    with locked(tmp_path / "new", wait=False):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with locked(tmp_path / "old", wait=False):
        pass
    assert list((tmp_path / "old").iterdir()) == []


def test_what_is_no_run_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    for changes in (
        {"overwrite": True},
        {"resume": str(tmp_path / "thesis")},
        {"resume": str(tmp_path / "no")},
    ):
        with pytest.raises(ConfigError, match=MANIFEST):
            experiments.run(experiment(tmp_path / "thesis", **changes), {}, [])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"Cannot make .*paths\.run"):
        experiments.run(experiment(tmp_path / "file" / "run"), {}, [])


def test_a_run_runs_only_while_somebody_has_its_lock(tmp_path):
    """What could not write how it ended, as on a full disk, is over all the same."""
    with locked(tmp_path / "run", wait=False):
        Run.create(tmp_path / "run", overwrite=False)
        assert read_run(tmp_path / "run").status == "RUNNING"
    assert read_run(tmp_path / "run").status == "KILLED"
