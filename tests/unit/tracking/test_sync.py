import json
import shutil

import pytest
from stores import QUIET, client

from sparse_exp.errors import ConfigError, SparseExpError
from sparse_exp.files import write_json
from sparse_exp.runs.directory import Run, StageRecord, locked
from sparse_exp.runs.replay import told_of, told_of_stage
from sparse_exp.tracking import Artifact, Dataset, RunInfo, Tags, as_plain
from sparse_exp.tracking.__main__ import main
from sparse_exp.tracking.mlflow import MlflowTracker, RunWriter


@pytest.fixture(scope="module")
def store(make_store):
    return make_store("store")


def broken(*_, **__):
    raise ConnectionError("out of reach")


def track(store, directory, monkeypatch, *, outage, ends=True):
    """One run as `sparse_exp.experiment` tracks it; with an outage nothing after its start arrives."""
    run = Run.create(directory, overwrite=False)
    tracker = MlflowTracker(QUIET, store)
    run.update(told=False, started=1e9)
    tracker.start(RunInfo("r", "trees", {"seed": 1}, {}, directory, told=lambda: told_of(run)))
    run.update(tracker_run_id=tracker.run_id, tracker_address=tracker.address)
    with monkeypatch.context() as patch:
        if outage:
            patch.setattr(tracker._delivery, "_send", broken)
        for event, at in told_of_stage(recorded(run), "train", epochs=True):
            tracker.log(event, at)
        if ends:
            run.update(status="FAILED", failure="the disk is full", ended=1e9 + 9)
            run.update(told=tracker.finish("FAILED", "the disk is full", 1e9 + 9))
    return tracker.run_id


def recorded(run):
    """The run with a record of a training of three epochs."""
    (run.path / "plots.md").write_text("# Plots")
    history = [{"epoch": n / 1, "val/map50": n / 10, "loss/box": 1.0, "ended": 1e9 + n} for n in (1, 2, 3)]
    write_json(run.path / "history.json", history)
    events = [
        Tags({"recipe": "dense"}),
        Tags({"recipe": "prune"}),
        Dataset("trees", "01" * 20, "index:a==1!b", "train", 100),
        Artifact(run.path / "plots.md", "report"),
    ]
    plain = [as_plain(event, run.path) for event in events]
    digests = run.digests([run.path / "history.json"])
    run.record(
        "train", StageRecord("mark", digests, {"val/map50": 0.35}, 7.0, ended=1e9 + 4, events=plain, step=300)
    )
    return run


def known(store, run_id):
    """All that MLflow knows of a run but its names."""
    api = client(store)
    run = api.get_run(run_id)
    return {
        "metrics": {key: [(m.step, m.value, m.timestamp) for m in api.get_metric_history(run_id, key)]
                    for key in run.data.metrics},
        "last": run.data.metrics,
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key != "mlflow.runName"},
        "inputs": [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs],
        "files": [file.path for file in api.list_artifacts(run_id, "report")],
        "status": (run.info.status, run.info.end_time),
    }  # fmt: skip


def test_what_was_missed_arrives_as_if_there_had_been_no_outage(store, tmp_path, monkeypatch, capsys):
    undisturbed = track(store, tmp_path / "outputs/runs/a", monkeypatch, outage=False)
    late = track(store, tmp_path / "outputs/runs/b", monkeypatch, outage=True)
    assert client(store).get_run(late).info.status == "RUNNING"
    assert main(["sync"]) == 0
    assert known(store, late) == known(store, undisturbed)
    assert [at for *_, at in known(store, late)["metrics"]["loss/box"]] == [
        (10**9 + n) * 1000 for n in (1, 2, 3)
    ]
    assert known(store, late)["last"]["val/map50"] == 0.35  # of the stage, and not of an epoch
    assert known(store, late)["status"] == ("FAILED", (10**9 + 9) * 1000)
    assert capsys.readouterr().out.splitlines() == [
        "outputs/runs/b: 11 events sent.",
        "1 run: 11 events sent, 0 left.",
    ]
    assert main(["sync"]) == 0
    assert capsys.readouterr().out == "No events wait to be sent.\n"

    # What a kill after the sending leaves is sent again, which changes nothing.
    Run.read(tmp_path / "outputs/runs/b").update(told=False)
    assert main(["sync", "outputs"]) == 0
    assert known(store, late) == known(store, undisturbed)


def test_a_kill_in_the_middle_of_a_sync_loses_nothing(store, tmp_path, monkeypatch):
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


def test_what_can_never_be_sent_is_dropped_with_a_line_and_the_rest_is_sent(
    store, tmp_path, monkeypatch, capsys
):
    directory = tmp_path / "runs" / "b"
    track(store, directory, monkeypatch, outage=True)
    (directory / "plots.md").unlink()
    assert main(["doctor", "--store", str(store)]) == 0  # other outputs
    assert main(["sync", "runs"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "runs/b: 10 events sent, 1 dropped, as their files are gone.",
        "1 run: 10 events sent, 0 left.",
    ]
    assert main(["sync", "runs"]) == 0


def test_a_run_that_was_deleted_in_the_store_is_told_nothing_more(store, tmp_path, monkeypatch, capsys):
    run_id = track(store, tmp_path / "run", monkeypatch, outage=True)
    client(store).delete_run(run_id)
    assert main(["sync", "run"]) == 0
    assert capsys.readouterr().out.startswith("run: 0 events sent (its run was deleted there).")
    assert main(["sync", "run"]) == 0


def test_stores_that_do_not_answer_or_do_not_know_the_run(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    addresses = {"a": "http://127.0.0.1:9", "b": f"sqlite:///{store / 'mlflow.db'}", "c": "http://***@there"}
    track(store, tmp_path / "first", monkeypatch, outage=False)
    for name, address in addresses.items():
        run = recorded(Run.create(tmp_path / "runs" / name, overwrite=False))
        run.update(status="FINISHED", told=False, tracker_run_id="b" * 32, tracker_address=address)
    assert main(["sync", "runs"]) == 1
    first, second, third, total = capsys.readouterr().out.splitlines()
    assert "127.0.0.1" in first
    assert "b" * 32 in second
    assert "MLFLOW_TRACKING_URI" in third
    assert total.startswith("3 runs: 0 events sent, ")
    assert not any(Run.read(path).state["told"] for path in (tmp_path / "runs").iterdir())


def test_a_run_that_is_not_over_is_left_alone(store, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    with locked(directory, wait=False):
        run_id = track(store, directory, monkeypatch, outage=True, ends=False)
        assert main(["sync", "run"]) == 1
        assert "not over" in capsys.readouterr().out
    assert client(store).get_run(run_id).data.metrics == {}


def test_a_run_that_was_killed_is_told_and_closed(store, tmp_path, monkeypatch, capsys):
    run_id = track(store, tmp_path / "run", monkeypatch, outage=False, ends=False)
    assert client(store).get_run(run_id).info.status == "RUNNING"
    assert main(["sync", "run"]) == 0
    assert known(store, run_id)["status"] == ("KILLED", (10**9 + 4) * 1000)
    assert known(store, run_id)["tags"]["failure"] == "its process is gone"


def test_the_epochs_of_a_training_that_was_killed_are_told(store, tmp_path, monkeypatch):
    run_id = track(store, tmp_path / "run", monkeypatch, outage=True, ends=False)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    write_json(tmp_path / "run" / "manifest.json", {**manifest, "stages": {}})
    assert main(["sync", "run"]) == 0
    assert [step for step, *_ in known(store, run_id)["metrics"]["val/map50"]] == [100, 200, 300]


def test_a_run_that_goes_on_sends_what_was_missed_but_not_its_earlier_end(store, tmp_path, monkeypatch):
    run_id = track(store, tmp_path / "run", monkeypatch, outage=True)
    run, tracker = Run.read(tmp_path / "run"), MlflowTracker(QUIET, store)
    tracker.start(RunInfo("r", "trees", {}, {}, run.path, run_id, told=lambda: told_of(run), missed=True))
    assert known(store, run_id)["status"][0] == "RUNNING"
    assert len(known(store, run_id)["metrics"]["loss/box"]) == 3
    assert tracker.finish("FINISHED")
    assert known(store, run_id)["status"][0] == "FINISHED"
    assert "failure" not in known(store, run_id)["tags"]


def test_a_run_that_was_moved_with_its_store_is_told_to_it(make_store, tmp_path, monkeypatch, capsys):
    (tmp_path / "old").mkdir()
    shutil.move(make_store("moves"), tmp_path / "old" / "mlflow")
    run_id = track(tmp_path / "old" / "mlflow", tmp_path / "old" / "runs" / "r", monkeypatch, outage=True)
    (tmp_path / "old").rename(tmp_path / "outputs")
    (tmp_path / "outputs" / "mlflow").rename(tmp_path / "elsewhere")
    assert main(["sync"]) == 1
    assert "mlflow.db is not there. If it was moved, name it with --uri" in capsys.readouterr().out
    (tmp_path / "elsewhere").rename(tmp_path / "outputs" / "mlflow")
    assert main(["sync"]) == 0
    assert known(tmp_path / "outputs" / "mlflow", run_id)["status"][0] == "FAILED"
    assert not (tmp_path / "old").exists()


def test_another_address_may_be_given(store, tmp_path, monkeypatch):
    run_id = track(store, tmp_path / "run", monkeypatch, outage=True)
    Run.read(tmp_path / "run").update(tracker_address="sqlite:////moved/mlflow.db")
    assert main(["sync", "run", "--uri", f"sqlite:///{store / 'mlflow.db'}"]) == 0
    assert known(store, run_id)["status"][0] == "FAILED"


def test_a_password_is_not_recorded(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@server:5000")
    assert MlflowTracker(QUIET, tmp_path).address == "http://***@server:5000"


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="DIR to be a directory, but got 'nowhere'"):
        main(["sync", "nowhere"])
    assert main(["sync"]) == 0


def test_a_local_store_that_is_no_database_is_one_line(tmp_path):
    run = Run.create(tmp_path / "outputs" / "runs" / "r", overwrite=False)
    run.update(told=False, tracker_run_id="0" * 32)
    (tmp_path / "outputs" / "mlflow").mkdir()
    (tmp_path / "outputs" / "mlflow" / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(SparseExpError, match="not a database") as error:
        main(["sync"])
    assert "\n" not in str(error.value)
