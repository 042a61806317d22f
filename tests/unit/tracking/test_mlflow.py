import json
import logging
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from stores import QUIET, client

from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import MissingDependency, SparseExpError
from sparse_exp.tracking import Artifact, Dataset, Metrics, Pause, Resume, RunInfo, Tags, find_runs
from sparse_exp.tracking.mlflow import MlflowTracker, sampling_interval
from sparse_exp.tracking.store import tracking_uri

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def store(make_store):
    """One database for most tests, at a path that needs care."""
    return make_store("läufe #1 100% ü")


def run_info(tmp_path, **kwargs):
    return RunInfo("a run", "trees", kwargs.pop("config", {}), kwargs.pop("tags", {}), tmp_path / "run")


def started(store, info, config=QUIET):
    tracker = MlflowTracker(config, store)
    tracker.start(info)
    return tracker


def test_contents_are_read_back(store, tmp_path):
    config = {"model": {"name": "yolov5s", "stub": None}, "wide": {f"p{i}": i for i in range(250)}}
    tracker = started(store, run_info(tmp_path, config=config, tags={"mlflow.parentRunId": "0" * 32}))
    for step, value in ((1, 0.25), (2, 0.5)):
        tracker.log(Metrics({"val/map50": value, "lr (peak)": 1e-3, "bad": float("nan")}, step))
    tracker.log(Metrics({"size/onnx_mb": 7.5}))
    tracker.log(Tags({"recipe": "transfer_quant", "weights/origin": "x" * 9000}))
    for split, size in (("train", 100), ("val", 24)):
        tracker.log(Dataset("trees", DIGEST, "index:deepforest==2.1.0!data", split, size))
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "ü.png").write_bytes(b"png")
    (tmp_path / "report.md").write_text("# Report")
    tracker.log(Artifact(tmp_path / "plots"))
    tracker.log(Artifact(tmp_path / "report.md", "report"))
    tracker.finish("FINISHED")

    api = client(store)
    run = api.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    assert api.get_experiment(run.info.experiment_id).name == "trees"
    assert run.data.params["model.name"] == "yolov5s"
    assert run.data.params["model.stub"] == "null"
    assert len(run.data.params) == 252
    history = api.get_metric_history(tracker.run_id, "val/map50")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.5)]
    assert run.data.metrics == {"val/map50": 0.5, "lr _peak_": 1e-3, "size/onnx_mb": 7.5}
    assert run.data.tags["recipe"] == "transfer_quant"
    assert run.data.tags["mlflow.parentRunId"] == "0" * 32
    assert run.data.tags["mlflow.source.name"] == "sparse_exp"
    assert len(run.data.tags["weights/origin"]) == 8000
    assert "failure" not in run.data.tags
    tags_of = {i.dataset.name: {t.key: t.value for t in i.tags} for i in run.inputs.dataset_inputs}
    assert tags_of == {
        f"trees/{split}": {"mlflow.data.context": split, "digest": DIGEST} for split in ("train", "val")
    }
    [val] = [i.dataset for i in run.inputs.dataset_inputs if i.dataset.name == "trees/val"]
    assert val.digest == DIGEST[:36]
    assert json.loads(val.source) == {"uri": "index:deepforest==2.1.0!data"}
    assert json.loads(val.profile) == {"images": 24}
    listed = [f.path for folder in ("plots", "report") for f in api.list_artifacts(tracker.run_id, folder)]
    assert listed == ["plots/ü.png", "report/report.md"]
    assert len(list(store.glob("artifacts/*/artifacts/report/report.md"))) == 1
    assert not (tmp_path / "mlruns").exists()


def test_finished_runs_are_found_by_a_tag_in_every_experiment_newest_first(store, tmp_path):
    ids = []
    for experiment, mark, status in (
        ("one", "abc", "FINISHED"),
        ("two", "abc", "FINISHED"),
        ("two", "abc", "FAILED"),
        ("two", "abcd", "FINISHED"),
    ):
        tracker = started(store, RunInfo("a run", experiment, {}, {}, tmp_path / "run"))
        tracker.log(Tags({"fingerprint.dense": mark, "run.directory": str(tmp_path)}))
        tracker.log(Metrics({"val/map50": 0.25}, 1))
        tracker.log(Metrics({"val/map50": 0.5 + len(ids)}, 2))
        tracker.finish(status)
        ids.append(tracker.run_id)
    found = find_runs(QUIET, store, "fingerprint.dense", "abc")
    assert [run.run_id for run in found] == [ids[1], ids[0]]
    assert [run.metrics["val/map50"] for run in found] == [1.5, 0.5]
    assert found[0].tags["run.directory"] == str(tmp_path)
    assert find_runs(QUIET, store, "fingerprint.dense", "none has it") == []


def test_a_store_that_cannot_be_searched_is_warned_of(tmp_path, caplog):
    (tmp_path / "mlflow.db").write_text("no database")
    assert find_runs(QUIET, tmp_path, "fingerprint.dense", "abc") == []
    (warning,) = caplog.records
    assert "cannot be searched" in warning.getMessage()
    assert find_runs(TrackerConfig(backend="none"), tmp_path, "fingerprint.dense", "abc") == []


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_reason_of_the_end_is_kept(store, tmp_path, status):
    tracker = started(store, run_info(tmp_path))
    tracker.finish(status, "Expected the moon, but got cheese.")
    run = client(store).get_run(tracker.run_id)
    assert run.info.status == status
    assert run.info.end_time >= run.info.start_time
    assert run.data.tags["failure"] == "Expected the moon, but got cheese."
    assert run.data.tags["mlflow.note.content"] == f"{status}: Expected the moon, but got cheese."


def test_who_names_the_server(tmp_path, monkeypatch):
    assert tracking_uri(TrackerConfig(), Path("s")) == (f"sqlite:///{tmp_path}/s/mlflow.db", "paths.mlflow")
    config = TrackerConfig(uri="http://config:1")
    assert tracking_uri(config, tmp_path) == ("http://config:1", "tracker.uri")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:1")
    assert tracking_uri(TrackerConfig(), tmp_path) == ("http://env:1", "MLFLOW_TRACKING_URI")
    # What files say is taken out before where the environment wins, so this was typed.
    assert tracking_uri(config, tmp_path) == ("http://config:1", "tracker.uri")


def test_the_environments_database_gets_the_run(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
    with caplog.at_level(logging.INFO):
        tracker = started(tmp_path / "ours", run_info(tmp_path))
    tracker.finish("FINISHED")
    assert client(store).get_run(tracker.run_id).info.status == "FINISHED"
    assert not (tmp_path / "ours").exists()
    assert "MLFLOW_TRACKING_URI" in caplog.text


def test_a_new_experiment_in_the_environments_database_keeps_files_with_ours(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
    (tmp_path / "a.txt").write_text("a")
    tracker = started(tmp_path / "ours", RunInfo("r", "another", {}, {}, tmp_path))
    tracker.log(Artifact(tmp_path / "a.txt"))
    tracker.finish("FINISHED")
    assert len(list(tmp_path.glob("ours/artifacts/*/artifacts/a.txt"))) == 1
    assert not (tmp_path / "mlruns").exists()


def system_steps(store, run_id):
    history = client(store).get_metric_history(run_id, "system/cpu_utilization_percentage")
    return [metric.step for metric in history]


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_system_metrics_stop_during_a_pause_and_go_on_after_it(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    tracker = started(store, run_info(tmp_path), TrackerConfig(system_metrics=True))
    wait_for(lambda: system_steps(store, tracker.run_id))
    tracker.log(Pause())
    before = system_steps(store, tracker.run_id)
    assert not any(thread.name == "SystemMetricsMonitor" for thread in threading.enumerate())
    time.sleep(0.3)
    assert system_steps(store, tracker.run_id) == before
    tracker.log(Resume())
    wait_for(lambda: len(system_steps(store, tracker.run_id)) > len(before))
    tracker.finish("FINISHED")
    steps = system_steps(store, tracker.run_id)
    assert steps == list(range(len(steps)))
    assert not any(thread.name == "SystemMetricsMonitor" for thread in threading.enumerate())


def test_an_outage_that_ends_loses_nothing(store, tmp_path, monkeypatch, caplog):
    told = [(Metrics({"loss/box": 3.0}, 1), 1.0), (Metrics({"loss/box": 2.0}, 2), 2.0)]
    tracker = started(store, replace(run_info(tmp_path), told=lambda: told))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(tracker._client, "log_batch", raise_outage)
        for event, at in told:
            tracker.log(event, at)
    assert len(caplog.records) == 1
    assert tracker.finish("FINISHED")
    history = client(store).get_metric_history(tracker.run_id, "loss/box")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(1, 3.0, 1000), (2, 2.0, 2000)]


def raise_outage(*_, **__):
    raise ConnectionError("out of reach")


def test_a_database_that_breaks_is_told_of_and_the_end_says_what_is_missing(store, tmp_path, caplog):
    started(store, run_info(tmp_path)).finish("FINISHED")
    shutil.copy(store / "mlflow.db", tmp_path)
    tracker = started(tmp_path, run_info(tmp_path))
    (tmp_path / "mlflow.db").write_bytes(b"rubbish" * 1000)
    with caplog.at_level(logging.WARNING):
        tracker.log(Metrics({"val/map50": 0.5}, 1))
        assert not tracker.finish("FAILED", "why")
    assert "Tracking failed (metrics)" in caplog.records[0].getMessage()
    assert "1 events could not be sent to MLflow" in caplog.records[-1].getMessage()
    assert list(tmp_path.glob("run/*")) == []


def test_of_a_database_that_cannot_be_written_there_is_one_line(store, tmp_path, caplog, capfd):
    started(store, run_info(tmp_path)).finish("FINISHED")
    shutil.copy(store / "mlflow.db", tmp_path)
    tracker = started(tmp_path, run_info(tmp_path))
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("DROP TABLE metrics")
    tracker.log(Metrics({"val/map50": 0.5}, 1))
    assert [record.name for record in caplog.records] == ["sparse_exp.tracking.delivery"]
    assert "Traceback" not in capfd.readouterr().err
    tracker.finish("FAILED", "why")


@pytest.fixture
def small_http_server():
    """Answers as an MLflow server does, as far as a start needs it."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            info = {"run_id": "a" * 32, "experiment_id": "1", "status": "RUNNING", "artifact_uri": "s3://x"}
            body = {"experiment": {"experiment_id": "1", "name": "trees"}, "run": {"info": info, "data": {}}}
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        do_GET = do_POST = reply

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_that_dies_only_warns(small_http_server, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    config = TrackerConfig(uri=f"http://127.0.0.1:{small_http_server.server_port}", system_metrics=False)
    tracker = started(tmp_path / "store", run_info(tmp_path), config)
    assert tracker.run_id == "a" * 32
    small_http_server.shutdown()
    small_http_server.server_close()
    with caplog.at_level(logging.WARNING):
        tracker.log(Metrics({"val/map50": 0.5}, 1))
        assert not tracker.finish("FINISHED")
    assert "metrics" in caplog.records[0].getMessage()
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://me:secret@127.0.0.1:9", "tracker.uri"),
        ("sqlite:////proc/nowhere/x.db", "nowhere"),
        ("sqlite:///what?.db", "question mark"),
        ("nonsense://x", "nonsense"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_in_one_line(tmp_path, monkeypatch, uri, reason):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = MlflowTracker(TrackerConfig(uri=uri), tmp_path / "store")
    with pytest.raises(SparseExpError, match=reason) as caught:
        tracker.start(run_info(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    assert "tracker=none" in message
    assert "secret" not in message
    assert not (tmp_path / "mlruns").exists()


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"my diary" * 100)
    with pytest.raises(SparseExpError, match="not a database"):
        MlflowTracker(QUIET, tmp_path).start(run_info(tmp_path))
    assert (tmp_path / "mlflow.db").read_bytes() == b"my diary" * 100


def test_a_run_that_cannot_be_described_does_not_stay_open(store, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setattr(MlflowClient, "log_batch", raise_outage)
    info = RunInfo("half", "halves", {"a": 1}, {}, tmp_path)
    with pytest.raises(SparseExpError, match="out of reach"):
        MlflowTracker(QUIET, store).start(info)
    api = client(store)
    [run] = api.search_runs([api.get_experiment_by_name("halves").experiment_id])
    assert run.info.status == "FAILED"


def test_without_mlflow_the_message_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingDependency, match="pip install mlflow"):
        MlflowTracker(QUIET, tmp_path).start(run_info(tmp_path))


START = """
import sys, logging
from pathlib import Path
from sparse_exp.config.schema import TrackerConfig
from sparse_exp.tracking import RunInfo, create_tracker
logging.basicConfig(level=logging.WARNING)
store = Path(sys.argv[1])
tracker = create_tracker(TrackerConfig(), store)
assert "mlflow" not in sys.modules
tracker.start(RunInfo("r", "trees", {"a": 1}, {}, store))
tracker.finish("FINISHED")
"""


@pytest.mark.slow
def test_two_processes_start_on_a_fresh_store_at_once_and_print_nothing(tmp_path):
    store = tmp_path / "fresh store"
    command = [sys.executable, "-c", START, str(store)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [(p.communicate(timeout=100)[0], p.returncode) for p in processes] == [("", 0)] * 2
    api = client(store)
    runs = api.search_runs([api.get_experiment_by_name("trees").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    assert not (tmp_path / "mlruns").exists()


def test_samples_of_the_host_grow_slower_than_a_run_goes_on():
    def samples(seconds: float) -> int:
        elapsed, count = 0.0, 0
        while elapsed < seconds:
            elapsed, count = elapsed + sampling_interval(elapsed), count + 1
        return count

    assert samples(3600) == 720
    assert samples(7 * 86_400) < 10_500
    assert samples(70 * 86_400) < 15_000
