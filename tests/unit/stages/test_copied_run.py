"""A run directory that was copied and is gone on with leaves the original's tracked run alone."""

from __future__ import annotations

import shutil

import pytest
from stores import QUIET, client


@pytest.fixture
def tracked(go, done, new_database, tmp_path):
    """A function like ``go``, of a run that is tracked; and the client of the store."""
    (tmp_path / "mlflow").mkdir()
    shutil.copy(new_database, tmp_path / "mlflow")
    return (lambda run: go(run, tracker=QUIET)), client(tmp_path / "mlflow")


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_only_a_copy_has_a_tracked_run_of_its_own_that_names_the_old_one(tracked, tmp_path, how, done):
    start, store = tracked
    first = start("run")
    old = first["tracker_run_id"]
    before = store.get_run(old).to_dictionary()
    done()
    place = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "run", place) if how == "copied" else (tmp_path / "run").rename(place)
    again = start(str(place))
    assert done() == []  # all stages are kept
    if how == "moved":
        assert (again["tracker_run_id"], again["key"]) == (old, first["key"])
        return
    assert again["key"] != first["key"]
    new = store.get_run(again["tracker_run_id"])
    assert (new.info.run_id != old, new.info.status) == (True, "FINISHED")
    assert new.data.tags["copied_from"] == old
    assert new.data.metrics["train/x"] == 1.0
    assert store.get_run(old).to_dictionary() == before
