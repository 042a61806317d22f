import json
from pathlib import Path

import pytest

from sparse_exp.config.places import find_places
from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import SparseExpError
from sparse_exp.runs.past import select_runs
from sparse_exp.tracking import PARENT_TAG, Artifact, Metrics, RunInfo
from sparse_exp.tracking.mlflow import MlflowTracker
from sparse_exp.tracking.reading import _ask, fetch_files, read_runs

LOCAL = TrackerConfig(system_metrics=False)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


class Store:
    """Two experiments: one with a parent, its two children (of which one failed) and a deleted run."""

    def __init__(self, folder: Path) -> None:
        from mlflow import MlflowClient

        self.path = folder / "läufe #1 100% ü"
        self.file = folder / "config.yaml"
        self.file.write_text("seed: 3\n")
        self.ids: dict[str, str] = {}
        self._track("parent", {})
        self._track("first", {"val/map50": 0.25}, parent="parent", overrides=["seed=1"])
        self._track("second", {"val/map50": 0.75, "lr": 1e-3}, "FAILED", parent="parent")
        self._track("deleted", {"val/map50": 0.5})
        self._track("elsewhere", {"size/onnx_mb": 3.0}, experiment="other")
        self.client = MlflowClient(f"sqlite:///{self.path / 'mlflow.db'}")
        self.client.delete_run(self.ids["deleted"])

    def _track(self, name, metrics, status="FINISHED", *, parent=None, overrides=None, experiment="trees"):
        tags = {PARENT_TAG: self.ids[parent]} if parent else {}
        tags |= {"overrides": json.dumps(overrides)} if overrides is not None else {}
        tracker = MlflowTracker(LOCAL, self.path)
        tracker.start(RunInfo(name, experiment, {"seed": 0}, tags, self.path / name))
        tracker.log(Metrics({key: value / 2 for key, value in metrics.items()}, 1))
        tracker.log(Metrics(metrics, 2))
        tracker.log(Artifact(self.file))
        tracker.finish(status)
        self.ids[name] = tracker.run_id


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("mlflow"))


@pytest.mark.parametrize(
    ("experiment", "names"),
    [
        (None, {"parent", "first", "second", "elsewhere"}),
        ("trees", {"parent", "first", "second"}),
        ("other", {"elsewhere"}),
    ],
)
def test_the_database_says_what_the_client_says(store, experiment, names):
    read = read_runs(LOCAL, store.path, experiment=experiment)
    assert {run.name for run in read} == names
    assert read == _ask(store.client, experiment, [])


def test_a_parent_brings_its_children(store):
    ids = [store.ids["parent"]]
    read = read_runs(LOCAL, store.path, run_ids=ids)
    assert {run.name for run in read} == {"parent", "first", "second"}
    assert read == _ask(store.client, None, ids)


def test_the_last_value_of_each_metric_is_read(store):
    second = read_runs(LOCAL, store.path, run_ids=[store.ids["second"]])
    assert [(run.status, run.metrics) for run in second] == [("FAILED", {"val/map50": 0.75, "lr": 1e-3})]


def test_runs_of_mlflow_are_past_runs_like_others(store, past_run, tmp_path):
    places = find_places(typed={"paths.mlflow": str(store.path)})
    runs = select_runs([], places, experiment="trees")
    assert {run.name: run.overrides for run in runs} == {"first": ("seed=1",), "second": None}  # no parent
    assert {run.name: run.metrics["val/map50"] for run in runs} == {"first": 0.25, "second": 0.75}
    directory = past_run(tmp_path / "first", {"val/map50": 0.25}, tracker_run_id=store.ids["first"])
    both = select_runs([str(directory), store.ids["parent"]], places)
    assert [run.place for run in both] == [str(directory), store.ids["second"]]  # the first only once


def test_a_store_is_asked_for_no_more_than_is_wanted(store):
    def names(**chosen) -> list[str]:
        return [run.name for run in read_runs(LOCAL, store.path, experiment="trees", **chosen)]

    everything = names()
    assert len(everything) == 3
    for newest in (1, 2, 3, 9):
        assert names(newest=newest) == names(newest=newest, only="attributes.run_name != 'none'")
        assert names(newest=newest) == everything[:newest]
    assert names(only="attributes.status = 'FAILED'") == ["second"]
    assert names(only="attributes.status = 'FAILED'", newest=1) == ["second"]
    for wrong in ("attributes.nope = 'x'", "status ="):
        with pytest.raises(SparseExpError) as raised:
            names(only=wrong)
        assert "\n" not in str(raised.value)


def test_files_are_brought(store, tmp_path):
    fetch_files(LOCAL, store.path, store.ids["first"], ["config.yaml", "none.txt"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "seed: 3\n"


def test_what_is_no_store_is_one_line_and_stays_as_it_is(store, tmp_path):
    other = tmp_path / "mlflow.db"
    other.write_bytes(b"no database, whatever its name says" * 50)
    for folder, said in ((tmp_path, "to be usable"), (tmp_path / "none", "a database with runs")):
        with pytest.raises(SparseExpError, match=said) as error:
            read_runs(LOCAL, folder)
        assert "\n" not in str(error.value)
    assert other.read_bytes() == b"no database, whatever its name says" * 50
    assert not (tmp_path / "none").exists()
    with pytest.raises(
        SparseExpError, match="--experiment to be an MLflow experiment with runs, but got 'tree'"
    ):
        read_runs(LOCAL, store.path, experiment="tree")
