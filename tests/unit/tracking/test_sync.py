import re

import pytest
from stores import QUIET, client

from sparse_exp.errors import ConfigError
from sparse_exp.tracking import Artifact, Dataset, Metrics, RunInfo, Tags
from sparse_exp.tracking.__main__ import main
from sparse_exp.tracking.mlflow import MlflowTracker, RunWriter
from sparse_exp.tracking.spool import UNSENT, Destination, Spool, Waiting


@pytest.fixture(scope="module")
def store(make_store):
    return make_store("store")


def broken(*_, **__):
    raise ConnectionError("out of reach")


def track(store, directory, monkeypatch, *, outage):
    """One run; with an outage nothing after its start arrives. Returns its id."""
    directory.mkdir(parents=True)
    (directory / "report.md").write_text("# Report")
    tracker = MlflowTracker(QUIET, store)
    tracker.start(RunInfo("r", "trees", {"seed": 1}, {}, directory))
    with monkeypatch.context() as patch:
        if outage:
            patch.setattr(tracker._outbox, "_send", broken)
        for step in (100, 200, 300):
            tracker.log(Metrics({"val/map50": step / 1000, "loss/box": 1.0}, step))
        tracker.log(Tags({"recipe": "dense"}))
        tracker.log(Tags({"recipe": "prune"}))
        tracker.log(Dataset("trees", "01" * 20, "index:a==1!b", "train", 100))
        tracker.log(Artifact(directory / "report.md", "report"))
        tracker.finish("FAILED", "the disk is full")
    return tracker.run_id


def known(store, run_id):
    """All that MLflow knows of a run but its times and names."""
    api = client(store)
    run = api.get_run(run_id)
    return {
        "metrics": {key: [(m.step, m.value) for m in api.get_metric_history(run_id, key)]
                    for key in run.data.metrics},
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key != "mlflow.runName"},
        "inputs": [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs],
        "files": [file.path for file in api.list_artifacts(run_id, "report")],
        "status": run.info.status,
    }  # fmt: skip


def test_what_waits_arrives_as_if_there_had_been_no_outage(store, tmp_path, monkeypatch, capsys):
    undisturbed = track(store, tmp_path / "outputs/runs/a", monkeypatch, outage=False)
    late = track(store, tmp_path / "outputs/runs/b", monkeypatch, outage=True)
    assert client(store).get_run(late).info.status == "RUNNING"
    before = (tmp_path / "outputs/runs/b" / UNSENT).read_text()
    assert main(["sync"]) == 0
    assert known(store, late) == known(store, undisturbed)
    last = [int(found) for found in re.findall(r'"time_ms": (\d+)', before)]
    times = [metric.timestamp for metric in client(store).get_metric_history(late, "val/map50")]
    assert times == last[:3]
    assert client(store).get_run(late).info.end_time == last[-1]
    assert capsys.readouterr().out.splitlines() == [
        "outputs/runs/b: 8 events sent.",
        "1 run: 8 events sent, 0 left.",
    ]
    assert not (tmp_path / "outputs/runs/b" / UNSENT).exists()

    # What a kill after the sending leaves is sent again, which changes nothing.
    (tmp_path / "outputs/runs/b" / UNSENT).write_text(before)
    assert main(["sync", "outputs"]) == 0
    assert known(store, late) == known(store, undisturbed)


def test_a_kill_in_the_middle_of_a_sync_keeps_every_event_that_did_not_arrive(store, tmp_path, monkeypatch):
    late = track(store, tmp_path / "outputs/runs/b", monkeypatch, outage=True)
    real, sent = RunWriter.send, []

    def until_killed(self, event, milliseconds):
        if len(sent) == 4:
            raise KeyboardInterrupt
        sent.append(event)
        real(self, event, milliseconds)

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "send", until_killed)
        with pytest.raises(KeyboardInterrupt):
            main(["sync"])
    assert main(["sync"]) == 0
    whole = track(store, tmp_path / "outputs/runs/a", monkeypatch, outage=False)
    assert known(store, late) == known(store, whole)


def test_what_cannot_be_sent_stays_and_the_rest_is_sent(store, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "runs" / "b"
    run_id = track(store, directory, monkeypatch, outage=True)
    (directory / "report.md").unlink()
    assert main(["sync", "runs"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("runs/b: 7 events sent, 1 left: ")
    assert "report.md" in out[0]
    assert out[1] == "1 run: 7 events sent, 1 left."
    (directory / "report.md").write_text("# Report")
    assert main(["sync", "runs"]) == 0
    assert client(store).list_artifacts(run_id, "report")


def test_stores_that_do_not_answer_or_do_not_know_the_run(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    addresses = {"a": "http://127.0.0.1:9", "b": f"sqlite:///{store / 'mlflow.db'}", "c": "http://***@there"}
    track(store, tmp_path / "first", monkeypatch, outage=False)
    for name, uri in addresses.items():
        Spool(tmp_path / "runs" / name, Destination(uri, "b" * 32)).append(Waiting(Tags({"a": "1"}), 1))
    assert main(["sync", "runs"]) == 1
    first, second, third, total = capsys.readouterr().out.splitlines()
    assert "127.0.0.1" in first
    assert "b" * 32 in second
    assert "MLFLOW_TRACKING_URI" in third
    assert total == "3 runs: 0 events sent, 3 left."
    assert len(list((tmp_path / "runs").glob(f"*/{UNSENT}"))) == 3


def test_a_run_that_is_not_over_keeps_its_events(store, tmp_path, monkeypatch, capsys):
    tracker = MlflowTracker(QUIET, store)
    tracker.start(RunInfo("r", "trees", {}, {}, tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(tracker._outbox, "_send", broken)
        tracker.log(Metrics({"val/map50": 0.5}, 1))
    assert main(["sync", "run"]) == 1
    assert "not over" in capsys.readouterr().out
    tracker.finish("FINISHED")
    assert main(["sync", "run"]) == 0
    assert client(store).get_run(tracker.run_id).data.metrics == {"val/map50": 0.5}
    assert capsys.readouterr().out == "No events wait to be sent.\n"


def test_a_run_that_goes_on_sends_what_waits_but_not_its_earlier_end(store, tmp_path, monkeypatch):
    run_id = track(store, tmp_path / "run", monkeypatch, outage=True)
    tracker = MlflowTracker(QUIET, store)
    tracker.start(RunInfo("r", "trees", {}, {}, tmp_path / "run", run_id))
    assert known(store, run_id)["status"] == "RUNNING"
    assert len(known(store, run_id)["metrics"]["val/map50"]) == 3
    tracker.finish("FINISHED")
    assert known(store, run_id)["status"] == "FINISHED"
    assert "failure" not in known(store, run_id)["tags"]


def test_another_address_may_be_given(store, tmp_path, monkeypatch):
    run_id = track(store, tmp_path / "run", monkeypatch, outage=True)
    path = tmp_path / "run" / UNSENT
    path.write_text(path.read_text().replace("sqlite:///", "sqlite:////moved", 1))
    assert main(["sync", "run", "--uri", f"sqlite:///{store / 'mlflow.db'}"]) == 0
    assert known(store, run_id)["status"] == "FAILED"


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="DIR to be a directory, but got 'nowhere'"):
        main(["sync", "nowhere"])
    assert main(["sync"]) == 0
