"""A sweep's own run: its note, how it is gone on with, and children that nobody closed."""

import pytest
from stores import QUIET, client

from sparse_exp.config.schema import TrackerConfig
from sparse_exp.tracking import PARENT_TAG, Artifact, Metrics, RunInfo, Tags, end_open_runs
from sparse_exp.tracking.description import NOTE_TAG, experiment_note
from sparse_exp.tracking.mlflow import MlflowTracker
from sparse_exp.tracking.reading import read_runs

TABLE = "## Result\n\n| run | mAP50 |\n|---|---|\n| a | 0.5 |"


@pytest.fixture(scope="module")
def store(make_store):
    return make_store("store")


def start(store, directory, run_id=None, tags=None, experiment="sweeps"):
    tracker = MlflowTracker(QUIET, store)
    tracker.start(RunInfo("sweep", experiment, {"sweep": {"trials": 2}}, tags or {}, directory, run_id))
    return tracker


def test_a_parent_keeps_its_table_whether_it_fails_or_goes_on(store, tmp_path):
    parent = start(store, tmp_path)
    (tmp_path / "table.csv").write_text("run,map50\n")
    parent.log(Tags({NOTE_TAG: TABLE}))
    parent.log(Artifact(tmp_path / "table.csv"))
    parent.finish("FAILED", "1 of 2 jobs failed: b")
    run = client(store).get_run(parent.run_id)
    assert run.data.tags[NOTE_TAG] == f"FAILED: 1 of 2 jobs failed: b\n\n{TABLE}"
    assert run.data.tags["failure"] == "1 of 2 jobs failed: b"

    again = start(store, tmp_path, parent.run_id)
    assert again.run_id == parent.run_id
    run = client(store).get_run(parent.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags[NOTE_TAG] == TABLE
    assert "failure" not in run.data.tags
    again.finish("KILLED", "interrupted")
    start(store, tmp_path, parent.run_id).finish("FAILED", "another reason")
    run = client(store).get_run(parent.run_id)
    assert run.data.tags[NOTE_TAG] == f"FAILED: another reason\n\n{TABLE}"

    last = start(store, tmp_path, parent.run_id)
    last.log(Tags({NOTE_TAG: TABLE + "\n| b | 0.6 |"}))
    last.finish("FINISHED")
    run = client(store).get_run(parent.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert run.data.tags[NOTE_TAG] == TABLE + "\n| b | 0.6 |"
    assert [file.path for file in client(store).list_artifacts(parent.run_id)] == ["table.csv"]


def test_children_that_say_running_are_closed_and_no_others(store, tmp_path):
    parent, stranger = start(store, tmp_path / "a"), start(store, tmp_path / "b")
    children = [
        start(store, tmp_path / f"c{number}", tags={PARENT_TAG: parent.run_id}) for number in range(3)
    ]
    other = start(store, tmp_path / "d", tags={PARENT_TAG: stranger.run_id})
    children[0].log(Metrics({"val/map50": 0.5}))
    children[0].finish("FINISHED")
    living = start(store, tmp_path / "living", tags={PARENT_TAG: parent.run_id})

    def end(of: str | None = parent.run_id) -> int:
        dead = [tracker.run_id for tracker in [*children, other]]
        return end_open_runs(QUIET, store, of, lambda run: run.run_id in dead, "KILLED", "its worker is gone")

    assert end() == 2
    trackers = [*children, other, parent, stranger, living]
    runs = [client(store).get_run(tracker.run_id) for tracker in trackers]
    assert [run.info.status for run in runs] == ["FINISHED", "KILLED", "KILLED", *["RUNNING"] * 4]
    assert runs[1].data.tags["failure"] == "its worker is gone"
    assert runs[1].info.end_time >= runs[1].info.start_time
    assert end() == 0
    assert end(None) == 1
    assert client(store).get_run(other.run_id).info.status == "KILLED"


def test_children_follow_a_parent_that_is_made_anew_in_another_experiment(store, tmp_path):
    parent = start(store, tmp_path / "a")
    children = [
        start(store, tmp_path / experiment, tags={PARENT_TAG: parent.run_id}, experiment=experiment)
        for experiment in ("sweeps", "others")
    ]
    client(store).delete_run(parent.run_id)
    anew = start(store, tmp_path / "a", parent.run_id, experiment="others")
    assert anew.run_id != parent.run_id
    ids = {child.run_id for child in children}
    assert {client(store).get_run(run_id).data.tags[PARENT_TAG] for run_id in ids} == {anew.run_id}
    found = {run.run_id for run in read_runs(QUIET, store, run_ids=[anew.run_id])}
    assert found == {anew.run_id, *ids}


def test_closing_never_raises(tmp_path, caplog):
    (tmp_path / "mlflow.db").write_text("no database")
    assert end_open_runs(QUIET, tmp_path, "a" * 32, bool, "FAILED", "why") == 0
    assert "cannot be closed" in caplog.text
    assert end_open_runs(TrackerConfig(backend="none"), tmp_path, "a" * 32, bool, "FAILED", "why") == 0


def test_an_experiment_is_described_once_and_ones_own_text_stays(store, tmp_path):
    def note():
        experiment = api.get_experiment_by_name("described")
        return experiment.tags.get(NOTE_TAG), experiment.experiment_id

    api = client(store)
    start(store, tmp_path, experiment="described").finish("FINISHED")
    text, name = note()
    assert text == experiment_note(name)
    assert "val/map50" in text
    for own in ("Ours.", ""):
        api.set_experiment_tag(name, NOTE_TAG, own)
        start(store, tmp_path, experiment="described").finish("FINISHED")
        assert note()[0] == own


def test_an_experiment_of_an_earlier_version_gets_its_description(store, tmp_path):
    name = client(store).create_experiment("older", artifact_location=(tmp_path / "files").as_uri())
    start(store, tmp_path, experiment="older").finish("FINISHED")
    assert client(store).get_experiment(name).tags[NOTE_TAG] == experiment_note(name)
