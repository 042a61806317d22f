"""What every tracker promises, whatever it logs to."""

import logging
from pathlib import Path

import pytest

from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import ConfigError
from sparse_exp.tracking import (
    Artifact,
    Dataset,
    Metrics,
    Model,
    Pause,
    Resume,
    RunInfo,
    Tags,
    create_tracker,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("trackers") / "store"


@pytest.fixture(params=["none", "mlflow"])
def tracker(request, store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return create_tracker(TrackerConfig(backend=request.param), store)


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "report.md").write_text("# Report")
    return RunInfo("a run", "trees", {"trainer": {"lr": 1e-3}}, {"model": "yolov5s"}, directory)


EVENTS = [
    Metrics({"val/map50": 0.5, "loss/box": float("nan")}, 1),
    Metrics({}, None),
    Tags({"recipe": "transfer_quant"}),
    Dataset("trees", "0123abcd" * 8, "index:deepforest==2.1.0!deepforest/data", "train", 100),
    Pause(),
    Pause(),
    Resume(),
    Resume(),
    Artifact(Path("run/report.md"), "report"),
]


def test_nothing_is_opened_before_the_start(tracker, store):
    assert tracker.run_id is None
    assert not store.exists()


def test_a_whole_run_goes_through_without_a_warning(tracker, run, caplog):
    with caplog.at_level(logging.WARNING):
        tracker.start(run)
        for event in EVENTS:
            tracker.log(event)
        tracker.finish("FINISHED")
    assert caplog.records == []
    assert not Path("mlruns").exists()
    assert sorted(path.name for path in run.directory.iterdir()) == ["report.md"]


def test_finishing_twice_or_without_a_start_does_nothing(tracker, run):
    tracker.finish("FAILED", "before the start")
    tracker.start(run)
    tracker.finish("FINISHED")
    tracker.finish("FAILED", "too late")
    assert not list(run.directory.glob("unsent*"))


def test_an_event_that_cannot_be_logged_does_not_raise(tracker, run):
    tracker.start(run)
    tracker.log(Artifact(Path("no such file")))
    tracker.finish("KILLED", "interrupted")


def test_a_model_that_is_no_model_does_not_raise(tracker, run):
    tracker.start(run)
    tracker.log(Model(run.directory / "report.md", "crowns", "candidate", {"map50": "0.5"}))
    tracker.finish("FINISHED")


def test_a_backend_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="mlflow or none"):
        create_tracker(TrackerConfig(backend="wandb"), tmp_path)
