"""A tracked run that goes on: as itself while it can, else as a new one that knows all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores import QUIET, client

from sparse_exp.errors import SparseExpError
from sparse_exp.tracking import PARENT_TAG, Metrics, RunInfo, Tags
from sparse_exp.tracking.mlflow import MlflowTracker

CONFIG = {"seed": 7, "stages": ["train"], "trainer": {"batch_size": 4}, "paths": {"run": "here"}}
TOLD = [(Metrics({"val/map50": 0.25}, 1), 1.0), (Metrics({"val/map50": 0.5}, 2), 2.0)]


@pytest.fixture(scope="module")
def store(make_store) -> Path:
    return make_store("store")


def start(store: Path, run_id: str | None = None, config: dict = CONFIG, **tags: str) -> MlflowTracker:
    tracker = MlflowTracker(QUIET, store)
    info = RunInfo("run", "runs", config, tags, Path("run"), run_id, told=lambda: TOLD, missed=False)
    tracker.start(info)
    return tracker


@pytest.fixture
def former(store) -> str:
    """The id of a run that has told all of itself and failed."""
    tracker = start(store)
    for event, at in TOLD:
        tracker.log(event, at)
    tracker.finish("FAILED", "why")
    return str(tracker.run_id)


def history(store: Path, run_id: str) -> list[tuple]:
    found = client(store).get_metric_history(run_id, "val/map50")
    return [(metric.step, metric.value, metric.timestamp) for metric in found]


def test_words_about_the_place_and_the_stages_change_no_parameter(store, former):
    config = {**CONFIG, "stages": ["report"], "paths": {"run": "there"}, "publish": "auto"}
    again = start(store, former, config)
    assert again.run_id == former
    again.finish("FINISHED")
    assert history(store, former) == [(1, 0.25, 1000), (2, 0.5, 2000)]


def test_other_values_begin_a_new_run_that_knows_all(store, former, caplog):
    config = {**CONFIG, "seed": 8, "trainer": {"batch_size": 2}}
    again = start(store, former, config)
    assert again.run_id != former
    assert (
        f"MLflow gets a new run in place of {former}: it has another seed, trainer.batch_size." in caplog.text
    )
    again.log(Metrics({"val/map50": 0.75}, 3), 3.0)
    assert again.finish("FINISHED")
    old, new = (client(store).get_run(run_id) for run_id in (former, again.run_id))
    assert (old.data.params["seed"], new.data.params["seed"]) == ("7", "8")
    assert (old.data.tags["continued_by"], new.data.tags["continues"]) == (again.run_id, former)
    assert (old.info.status, new.info.status) == ("FAILED", "FINISHED")
    assert history(store, again.run_id) == [(1, 0.25, 1000), (2, 0.5, 2000), (3, 0.75, 3000)]
    assert start(store, str(again.run_id), config).run_id == again.run_id


@pytest.mark.parametrize("lost", ["deleted", "other store"])
def test_a_run_that_the_store_does_not_have_is_told_anew(store, former, make_store, lost):
    place = make_store("other") if lost == "other store" else store
    if lost == "deleted":
        client(store).delete_run(former)
    again = start(place, former)
    assert again.run_id != former
    assert again.finish("FINISHED")
    assert history(place, again.run_id) == [(1, 0.25, 1000), (2, 0.5, 2000)]
    assert client(place).get_run(again.run_id).data.tags["continues"] == former


def test_children_follow_to_the_run_that_takes_their_parents_place(store):
    parent = start(store)
    children = [start(store, **{PARENT_TAG: str(parent.run_id)}) for _ in range(2)]
    client(store).delete_run(parent.run_id)
    again = start(store, str(parent.run_id))
    tags = [client(store).get_run(child.run_id).data.tags for child in children]
    assert [each[PARENT_TAG] for each in tags] == [again.run_id] * 2


def test_a_run_that_was_taken_for_dead_and_ends_well_did_not_fail(store):
    tracker, other = start(store), start(store)
    tracker.log(Tags({"mlflow.note.content": "Mine."}))
    writer = MlflowTracker(QUIET, store)
    writer.start(RunInfo("run", "runs", CONFIG, {}, Path("run"), tracker.run_id))
    writer.finish("KILLED", "its process is gone")
    tracker.finish("FINISHED")
    other.finish("FINISHED")
    run = client(store).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags
    assert run.data.tags["mlflow.note.content"] == "Mine."


def test_an_experiment_that_was_deleted_is_named_with_what_restores_it(make_store):
    place = make_store("deleted")
    start(place).finish("FINISHED")
    experiment = client(place).get_experiment_by_name("runs").experiment_id
    client(place).delete_experiment(experiment)
    with pytest.raises(SparseExpError) as raised:
        start(place)
    assert str(raised.value) == (
        "The MLflow experiment runs was deleted. Restore it with mlflow experiments restore "
        f"--experiment-id {experiment}, or choose another with tracker.experiment=NAME."
    )
