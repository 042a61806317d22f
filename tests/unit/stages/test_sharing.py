from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from finished_run import pruned, save

from sparse_exp import experiment as experiments
from sparse_exp import locks as host
from sparse_exp.config.schema import (
    DatasetConfig,
    Experiment,
    ExportConfig,
    HardwareConfig,
    LauncherConfig,
    ModelConfig,
    PathsConfig,
    RecipeConfig,
    RecoveryConfig,
    SweepConfig,
    TrackerConfig,
)
from sparse_exp.errors import StageFailed
from sparse_exp.files import write_text
from sparse_exp.runs.directory import FORMER, MANIFEST, Run
from sparse_exp.stages import baseline as recovery
from sparse_exp.stages.base import Outcome, SweepMember
from sparse_exp.stages.registry import STAGES
from sparse_exp.tracking import Artifact, Dataset, Metrics, NoTracker, Tags

importlib.import_module("sparse_exp.recipes.recipe")  # forked processes then have it
FORK = multiprocessing.get_context("fork")
SHARED = ["fetch", "plan", "baseline", "train", "evaluate", "export", "verify"]


@pytest.fixture(autouse=True)
def sweep(monkeypatch, tmp_path, tmp_path_factory) -> Path:
    """The directory of a sweep; the data set is built once for all tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host, "_SECONDS_BETWEEN_TRIES", 0.02)
    monkeypatch.setattr(host, "default_lock_path", lambda: tmp_path / "host.lock")
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(tmp_path_factory.getbasetemp() / "shared-cache"))
    return tmp_path / "sweep"


def job(number: int, **changes) -> Experiment:
    values = {
        "name": "tiny",
        "stages": SHARED,
        "model": ModelConfig(name="yolov5n", size="n", weights="scratch", sparsity=0.4),
        "dataset": DatasetConfig(name="digits", generator="digits", imgsz=64),
        "recipe": RecipeConfig(name="transfer", file="transfer.md", variables={"num_epochs": 1}),
        "hardware": HardwareConfig(name="cpu", engines=["onnxruntime"], cores=[1]),
        "export": ExportConfig(map_atol=1, score_atol=1, box_atol=100),
        "tracker": TrackerConfig(backend="none"),
        "paths": PathsConfig(output="out", run=f"sweep/{number}-tiny", mlflow="mlflow"),
    }
    return Experiment(**{**values, **changes})


DENSE = RecipeConfig(name="dense", file="dense.md", variables={"num_epochs": 1})


def run(experiment: Experiment):
    """Run it as a job of the sweep; its directory."""
    experiments.run(experiment, {}, [], SweepMember(Path("sweep").absolute(), None))
    return Path(experiment.paths.run)


def records(directory: Path | str) -> dict:
    return json.loads((Path(directory) / MANIFEST).read_text())["stages"]


def marks(directory: Path | str) -> dict[str, str]:
    return {stage: record["fingerprint"] for stage, record in records(directory).items()}


def origins(directory: Path | str) -> dict[str, str | None]:
    return {stage: record["shared_from"] for stage, record in records(directory).items()}


def replace_run(monkeypatch, stage: str, do) -> None:
    """Let a stage do something else; all else that is known of it stays."""
    monkeypatch.setitem(STAGES, stage, replace(STAGES[stage], run=do))


@pytest.fixture
def done(monkeypatch, tmp_path):
    """Stages that do next to nothing; a function that says which were done, by all processes."""
    log = tmp_path / "done"
    log.touch()

    def fake(stage):
        def do(context):
            with log.open("a") as stream:
                stream.write(f"{stage} {context.run.path.name}\n")
            return Outcome([write_text(context.run.path / f"{stage}.txt", stage)], {f"{stage}/x": 1.0})

        return do

    for stage in STAGES:
        replace_run(monkeypatch, stage, fake(stage))
    monkeypatch.setattr(experiments, "packages", list)  # what is written down of this host
    monkeypatch.setattr(experiments, "current", lambda _: {})
    return lambda: log.read_text().splitlines()


def test_jobs_that_differ_in_the_hardware_alone_share_all_before_it(done):
    everything = [*SHARED, "benchmark", "report"]
    first = run(job(0, stages=everything))
    assert origins(first) == dict.fromkeys(everything)
    other = HardwareConfig(name="throughput", engines=["onnxruntime"], batch_sizes=[8])
    second = run(job(1, stages=everything, hardware=other))
    shared = [stage for stage in SHARED if stage != "baseline"]  # which sees to that itself
    assert origins(second) == {stage: "0-tiny" if stage in shared else None for stage in everything}
    assert [line for line in done() if line.endswith("1-tiny")] == [
        "baseline 1-tiny", "benchmark 1-tiny", "report 1-tiny"
    ]  # fmt: skip
    assert (second / "train.txt").read_text() == "train"
    assert json.loads((second / "result.json").read_text())["train/x"] == 1.0


def test_the_seconds_are_those_of_who_did_it(done, monkeypatch):
    real = STAGES["train"].run
    replace_run(monkeypatch, "train", lambda context: time.sleep(0.3) or real(context))
    seconds = [records(run(job(number)))["train"]["seconds"] for number in range(2)]
    assert seconds[0] == seconds[1] > 0.3


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"hardware": HardwareConfig(name="other", engines=["onnxruntime"], cores=[2], repeats=1)},
        {"tracker": TrackerConfig(backend="none", experiment="other", register="name")},
        {"launcher": LauncherConfig(name="joblib", jobs=4)},
        {"sweep": SweepConfig(name="other", objectives=["map50"])},
        {"paths": PathsConfig(output="o", run="sweep/1-tiny", mlflow="m", zoo="z", cache="cache")},
        {"recipe": replace(job(0).recipe, name="other")},
        {"recovery": RecoveryConfig("auto")},  # with fakes it finds nothing: as without
    ],
)
def test_where_and_how_a_job_runs_is_in_no_fingerprint_of_what_is_shared(done, changes):
    one, other = marks(run(job(0))), marks(run(job(1, **changes)))
    assert {stage for stage in SHARED if one[stage] != other[stage]} <= {"baseline"}


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"seed": 1}, SHARED[1:]),
        ({"model": ModelConfig(name="yolov5s", size="s", weights="scratch", sparsity=0.4)}, SHARED),
        (
            {"recipe": RecipeConfig(name="transfer", file="transfer.md", variables={"num_epochs": 2})},
            SHARED[1:],
        ),
        ({"recipe": replace(job(0).recipe, optimizer="sgd")}, SHARED[1:]),
        ({"export": ExportConfig(opset=14)}, ["export", "verify"]),
        ({"hardware": HardwareConfig(name="cpu", engines=["openvino"], cores=[1])}, ["verify"]),
    ],
)
def test_what_a_stage_depends_on_is_in_its_fingerprint(done, changes, differing):
    one, other = marks(run(job(0))), marks(run(job(1, **changes)))
    assert [stage for stage in SHARED if one[stage] != other[stage]] == differing


def test_jobs_without_a_training_share_what_was_made_of_the_same_checkpoint(done, tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        save(tmp_path / f"{name}.pt", pruned(("digit",), seed=seed), ("digit",), phase="pruned")
    words = [{"stages": ["export", "verify"], "checkpoint": str(tmp_path / f"{name}.pt")} for name in "abc"]
    one, other, copy = (run(job(number, **changes)) for number, changes in enumerate(words))
    assert origins(other) == {"export": None, "verify": None}
    assert origins(copy) == {"export": one.name, "verify": one.name}
    shutil.copy(tmp_path / "b.pt", tmp_path / "a.pt")  # the same path says nothing
    assert origins(run(job(3, **words[0]))) == dict.fromkeys(("export", "verify"), other.name)
    larger = DatasetConfig(name="digits", generator="digits", imgsz=96)
    assert origins(run(job(4, **words[1], dataset=larger))) == {"export": None, "verify": None}


def test_outside_of_a_sweep_nothing_is_shared(done):
    for number in range(2):
        experiments.run(job(number), {}, [])
    assert origins("sweep/1-tiny") == dict.fromkeys(SHARED)
    assert done().count("train 1-tiny") == 1


@pytest.mark.parametrize("change", ["edit", "delete", "manifest"])
def test_what_is_no_longer_as_it_was_written_is_made_anew(done, change):
    first = run(job(0))
    if change == "edit":
        (first / "train.txt").write_text("tampered")
    elif change == "delete":
        (first / "train.txt").unlink()
    else:
        (first / MANIFEST).write_text((first / MANIFEST).read_text()[:-30])
        (first / FORMER).unlink()
    second = run(job(1))
    assert origins(second)["train"] is None
    assert origins(second)["fetch"] == (None if change == "manifest" else "0-tiny")
    assert (second / "train.txt").read_text() == "train"


def test_files_are_not_copied_and_yet_each_runs_own(done):
    first, second = run(job(0)), run(job(1))
    assert (first / "train.txt").samefile(second / "train.txt")
    write_text(second / "train.txt", "changed")
    assert (first / "train.txt").read_text() == "train"
    third = run(job(2, overwrite=True))
    assert origins(third)["train"] == "0-tiny"


def test_what_was_taken_over_can_be_taken_over_and_names_who_did_it(done):
    first = run(job(0))
    run(job(1))
    (first / MANIFEST).unlink()
    third = run(job(2))
    assert origins(third)["train"] == "0-tiny"
    assert "train 2-tiny" not in done()


def test_where_no_link_can_be_made_files_are_copied(done, monkeypatch):
    def refuse(*_):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    first, second = run(job(0)), run(job(1))
    assert origins(second)["train"] == "0-tiny"
    assert not (first / "train.txt").samefile(second / "train.txt")
    assert (second / "train.txt").read_text() == "train"


@pytest.fixture
def start():
    processes = []

    def begin(experiment):
        process = FORK.Process(target=run, args=(experiment,), daemon=True)
        process.start()
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.join()


def slow_stage(monkeypatch, stage: str, seconds: float, fails: str = "") -> None:
    """Let a stage take a while, and fail in the job of that name."""
    real = STAGES[stage].run

    def slow(context):
        Path(f"{stage}-begun").touch()
        time.sleep(seconds)
        if context.run.path.name == fails:
            raise ValueError("out of luck")
        return real(context)

    replace_run(monkeypatch, stage, slow)


def until(folder: Path, pattern: str) -> bool:
    """Wait until a file is there; real time, whatever `time.sleep` is."""
    end = time.monotonic() + 30
    while not list(folder.glob(pattern)):
        assert time.monotonic() < end
        threading.Event().wait(0.01)
    return True


def test_jobs_at_the_same_time_do_it_once(done, start, monkeypatch, sweep):
    slow_stage(monkeypatch, "train", 0.3)
    processes = [start(job(number)) for number in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    for stage in SHARED:
        wanted = 3 if stage == "baseline" else 1
        assert len([line for line in done() if line.startswith(f"{stage} ")]) == wanted
    for number in range(3):
        assert json.loads((sweep / f"{number}-tiny" / "result.json").read_text())["verify/x"] == 1.0
    assert list((sweep / ".locks").iterdir()) == []


def test_where_one_fails_the_next_tries_itself(done, start, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(host, "_SECONDS_BEFORE_A_LINE", 0.0)
    slow_stage(monkeypatch, "train", 0.0, fails="0-tiny")
    with monkeypatch.context() as patch:
        real, sleep = STAGES["train"].run, time.sleep
        replace_run(patch, "train", lambda context: until(Path(), "waited-for") and real(context))
        first = start(job(0))
    until(Path("sweep/.locks"), "train-*")
    monkeypatch.setattr(host.time, "sleep", lambda seconds: Path("waited-for").touch() or sleep(seconds))
    second = run(job(1))
    first.join(30)
    assert first.exitcode == 1
    assert "The stage train is being done by the job 0-tiny (process" in caplog.text
    assert origins(second) == {**dict.fromkeys(SHARED), "fetch": "0-tiny", "plan": "0-tiny"}
    failed = json.loads(Path("sweep/0-tiny", MANIFEST).read_text())
    assert (failed["status"], "out of luck" in failed["failure"]) == ("FAILED", True)


def test_where_one_is_killed_the_next_does_it(done, start, monkeypatch):
    slow_stage(monkeypatch, "train", 0.0)
    with monkeypatch.context() as patch:
        slow_stage(patch, "train", 60)
        first = start(job(0))
    until(Path(), "train-begun")
    threading.Timer(0.5, lambda: os.kill(first.pid, signal.SIGKILL)).start()
    second = run(job(1))
    first.join()
    assert first.exitcode == -signal.SIGKILL
    assert origins(second)["train"] is None
    assert origins(second)["plan"] == "0-tiny"


class Recorder(NoTracker):
    """Keeps the events of a run."""

    def __init__(self) -> None:
        self.events = []
        self.run_id = None

    def start(self, run):
        self.run_id = f"run-{id(self)}"
        for event, at in run.told() if run.missed else ():
            self.log(event, at)

    def log(self, event, at=None):
        self.events.append(event)

    def told(self, directory: Path) -> dict:
        """What a user of the tracker sees, whichever order it came in."""
        metrics, tags = {}, {}
        for event in self.events:
            for name, value in event.values.items() if isinstance(event, Metrics) else ():
                metrics.setdefault(name, []).append((event.step, value))
            tags |= event.values if isinstance(event, Tags) else {}
        paths = [event.path for event in self.events if isinstance(event, Artifact)]
        return {
            "metrics": {name: values for name, values in metrics.items() if name != "time/baseline_s"},
            "tags": tags,
            "datasets": [event for event in self.events if isinstance(event, Dataset)],
            "artifacts": sorted({str(path.relative_to(directory.resolve())) for path in paths}),
        }


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A job for real, and what its tracker was told; change nothing of it."""
    place = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("SPARSE_EXP_CACHE", str(tmp_path_factory.getbasetemp() / "shared-cache"))
        patch.setattr(host, "default_lock_path", lambda: place / "host.lock")
        tracker = Recorder()
        patch.setattr(experiments, "create_tracker", lambda *_: tracker)
        directory = run(job(0)).absolute()
    return directory, tracker.told(directory)


def test_the_tracker_is_told_the_same_of_a_job_that_took_everything_over(real, monkeypatch):
    directory, told = real
    monkeypatch.chdir(directory.parents[1])
    tracker = Recorder()
    monkeypatch.setattr(experiments, "create_tracker", lambda *_: tracker)
    second = run(job(1, hardware=HardwareConfig(name="other", engines=["onnxruntime"], cores=[2])))
    assert {
        stage: origin for stage, origin in origins(second).items() if stage != "baseline"
    } == dict.fromkeys([stage for stage in SHARED if stage != "baseline"], "0-tiny")
    assert tracker.told(second) == told
    assert [step for step, _ in told["metrics"]["loss/box"]] == [100]  # one epoch
    assert {"val/map50", "time/train_s", "deployed/onnxruntime/map50"} <= set(told["metrics"])
    assert len(told["datasets"]) == 3
    assert told["tags"]["weights/origin"] == "scratch"
    for name in ("recipe.md", "sparsity.csv", "history.json", "deployment/model.onnx"):
        assert (second / name).read_bytes() == (directory / name).read_bytes()
    results = [json.loads((run_ / "result.json").read_text()) for run_ in (directory, second)]
    for result in results:
        del result["time/baseline_s"]
    assert results[0] == results[1]


def test_a_new_run_of_the_tracker_is_told_of_stages_that_are_kept(real, monkeypatch):
    directory, told = real
    monkeypatch.chdir(directory.parents[1])
    Run.read(directory).update(tracker_run_id=None)  # as after tracker=none
    tracker = Recorder()
    monkeypatch.setattr(experiments, "create_tracker", lambda *_: tracker)
    run(job(0, resume=str(directory)))
    assert tracker.told(directory) == told


def test_a_dense_job_and_a_counterpart_are_the_same_training(done, monkeypatch):
    monkeypatch.setattr(recovery, "_fingerprint", lambda *_: "mark")
    sparse = job(0, recovery=RecoveryConfig("auto"))
    own = marks(run(job(1, recipe=DENSE, recovery=RecoveryConfig("auto"))))
    counterpart = recovery.dense_experiment(sparse, 1.0)
    counterpart.paths.run = str(Path("sweep/0-tiny-dense").absolute())
    nested = marks(run(counterpart))
    assert nested == {stage: own[stage] for stage in nested if stage != "baseline"} | {
        "baseline": nested["baseline"]
    }
    assert origins("sweep/0-tiny-dense")["train"] == "1-tiny"


@pytest.fixture
def dense_only(done, monkeypatch):
    """Stages as above, but for that of the baseline; the dense recipe's training takes a while."""
    monkeypatch.setattr(recovery, "_fingerprint", lambda *_: "mark")

    def evaluated(context):
        return {"dense_fingerprint": context.facts("baseline").get("dense_fingerprint")}

    facts = {"fetch": lambda _: {"sha256": "", "origin": "scratch"}, "evaluate": evaluated}
    facts["baseline"] = lambda context: recovery.STAGE.run(context).facts
    for stage, find in facts.items():
        replace_run(monkeypatch, stage, with_facts(STAGES[stage].run, find))
    slow_stage(monkeypatch, "train", 0.5)
    return {"stages": SHARED[:5], "recovery": RecoveryConfig("auto")}


def with_facts(stage, find):
    return lambda context: replace(stage(context), facts=find(context), metrics={"val/map50": 0.5})


@pytest.mark.parametrize("recipes", [["transfer", "dense", "transfer"], ["transfer", "transfer"]])
def test_jobs_that_need_the_same_dense_baseline_train_it_once(dense_only, done, start, recipes):
    """Whether the dense recipe is a job itself or not, all at once."""
    processes = []
    for number, recipe in enumerate(recipes):
        chosen = {"recipe": DENSE} if recipe == "dense" else {"export": ExportConfig(), "seed": 0}
        processes.append(start(job(number, **dense_only, **chosen)))
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(recipes)
    own = {f"{number}-tiny" for number, recipe in enumerate(recipes) if recipe == "dense"}
    trained = [line.removeprefix("train ") for line in done() if line.startswith("train ")]
    assert len([name for name in trained if name.endswith("-dense") or name in own]) == 1
    for number, recipe in enumerate(recipes):
        if recipe == "transfer":
            facts = records(f"sweep/{number}-tiny")["baseline"]["facts"]
            assert facts["map50"] == 0.5
            assert records(f"sweep/{number}-tiny/{facts['directory']}")["train"]


CHILD = """
import logging, sys
import test_sharing
logging.basicConfig(level=logging.INFO, format="%(message)s")
test_sharing.run(test_sharing.job(int(sys.argv[1])))
"""


@pytest.mark.slow  # two interpreters with all libraries
def test_two_real_jobs_with_the_same_training_train_once(tmp_path):
    modules = os.pathsep.join(map(str, Path(__file__).parents[:3]))  # this one, and what it imports
    environment = {**os.environ, "PYTHONPATH": modules, "SPARSE_EXP_LOCKS": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    processes = [subprocess.Popen([sys.executable, "-c", CHILD, str(number)], **pipes) for number in range(2)]
    logs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)
    assert sum(log.count("epoch 1 ") for log in logs) == 1
    results = [json.loads(Path(f"sweep/{number}-tiny/result.json").read_text()) for number in range(2)]
    for result in results:
        del result["time/baseline_s"]
    assert results[0] == results[1]


def test_a_dense_baseline_that_fails_is_tried_by_the_next(monkeypatch, done):
    monkeypatch.setattr(recovery, "_fingerprint", lambda *_: "mark")
    slow_stage(monkeypatch, "train", 0.0, fails="1-tiny")
    with pytest.raises(StageFailed):
        run(job(1, recipe=DENSE))
    assert run(job(2, recipe=DENSE)).is_dir()
