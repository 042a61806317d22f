"""Stores that were moved, runs that died, events that can never be sent: found, and mended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from stores import QUIET, client

from sparse_exp.config.schema import TrackerConfig
from sparse_exp.files import write_json, write_text
from sparse_exp.runs.directory import LOCK, Run, locked
from sparse_exp.tracking import Artifact, RunInfo
from sparse_exp.tracking.__main__ import main
from sparse_exp.tracking.mlflow import MlflowTracker
from sparse_exp.tracking.relocation import moved_from


def tracked(store: Path, name: str = "a", config: TrackerConfig = QUIET, **tags: str) -> str:
    """The id of a run with an artifact that is the run's name."""
    tracker = MlflowTracker(config, store)
    tracker.start(RunInfo(name, "runs", {}, tags, Path(name)))
    tracker.log(Artifact(write_text(Path(f"{name}.txt"), name)))
    tracker.finish("FINISHED")
    return str(tracker.run_id)


def read(store: Path, run_id: str, place: Path) -> str:
    """The artifact of a run, as MLflow finds it."""
    (name,) = [file.path for file in client(store).list_artifacts(run_id)]
    return Path(client(store).download_artifacts(run_id, name, str(place))).read_text()


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_store_that_was_moved_has_its_artifacts_with_it(make_store, tmp_path, how):
    old, new = make_store("old"), tmp_path / "läufe #1"
    first = tracked(old)
    if how == "moved":
        old.rename(new)
    else:
        shutil.copytree(old, new)
    before = sorted(old.rglob("*"))
    assert moved_from(new) == [(old / "artifacts").as_uri()]
    second = tracked(new, "b")
    assert sorted(old.rglob("*")) == before  # nothing is written to the old place
    assert moved_from(new) == []
    assert [read(new, run_id, tmp_path) for run_id in (first, second)] == ["a", "b"]
    assert {path.parent.parent.parent for path in new.rglob("*.txt")} == {new / "artifacts"}


def test_artifacts_on_a_share_that_is_not_mounted_stay_there(make_store, tmp_path):
    store, share = make_store("store"), tmp_path / "share"
    (share / "artifacts").mkdir(parents=True)
    client(store).create_experiment("runs", (share / "artifacts").as_uri())
    run_id = tracked(store)
    share.rename(tmp_path / "unmounted")
    share.mkdir()  # where it is mounted
    assert moved_from(store) == []
    share.rmdir()
    (tmp_path / "unmounted").rename(share)
    assert read(store, run_id, tmp_path) == "a"


def test_a_store_without_runs_that_was_moved_writes_where_it_is(make_store, tmp_path):
    old = make_store("old")
    client(old).create_experiment("runs", (old / "artifacts").as_uri())
    old.rename(tmp_path / "new")
    run_id = tracked(tmp_path / "new")
    assert (tmp_path / "new" / "artifacts" / run_id).is_dir()
    assert not old.exists()


def test_artifacts_that_lie_elsewhere_on_purpose_stay_there(make_store, tmp_path, monkeypatch):
    store = make_store("store")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
        theirs = tracked(tmp_path / "elsewhere")
    tracked(store, "b")
    assert moved_from(store) == []
    assert read(store, theirs, tmp_path) == "a"


@pytest.fixture
def doctor(capsys):
    """A function that calls the command on a store: its exit code and what it printed."""

    def call(store: Path, *words: str) -> tuple[int, str]:
        return main(["doctor", "--store", str(store), *words]), capsys.readouterr().out

    return call


def test_the_doctor_finds_what_died_and_leaves_what_lives(make_store, tmp_path, doctor):
    store = make_store("store")
    ids = {}
    for name in ("dead", "alive", "sweep"):
        Run.create(tmp_path / name, overwrite=False)
        tracker = MlflowTracker(QUIET, store)
        tracker.start(RunInfo(name, "runs", {}, {"run.directory": str(tmp_path / name)}, tmp_path / name))
        ids[name] = tracker.run_id
    (tmp_path / "sweep" / "manifest.json").unlink()
    write_json(tmp_path / "sweep" / "sweep.json", {"parent": ids["sweep"]})
    Run.read(tmp_path / "dead").update(tracker_run_id=ids["dead"])
    with locked(tmp_path / "alive", wait=False):
        code, said = doctor(store)
        assert code == 1
        assert said.splitlines() == [
            f"sweep says RUNNING, and its process is gone: {tmp_path / 'sweep'}",
            f"dead says RUNNING, and its process is gone: {tmp_path / 'dead'}",
            "2 found; --fix mends them.",
        ]
        assert doctor(store, "--fix")[0] == 0
        status = {name: client(store).get_run(run_id).info.status for name, run_id in ids.items()}
        assert status == {"dead": "KILLED", "alive": "RUNNING", "sweep": "KILLED"}
        assert doctor(store) == (0, "Nothing is wrong.\n")
    assert not (tmp_path / "alive" / LOCK).exists()


def test_the_doctor_mends_a_store_that_was_moved(make_store, tmp_path, doctor):
    old = make_store("old")
    run_id = tracked(old)
    old.rename(tmp_path / "new")
    code, said = doctor(tmp_path / "new")
    assert (code, said.splitlines()[-1]) == (1, "1 found; --fix mends them.")
    assert doctor(tmp_path / "new", "--fix")[0] == 0
    assert doctor(tmp_path / "new") == (0, "Nothing is wrong.\n")
    assert read(tmp_path / "new", run_id, tmp_path) == "a"


def test_where_there_is_no_store_nothing_is_wrong_and_none_is_made(tmp_path, doctor):
    assert doctor(tmp_path / "none") == (0, "Nothing is wrong.\n")
    assert not (tmp_path / "none").exists()
