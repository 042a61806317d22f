from __future__ import annotations

import json
import logging
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_exp import experiment as experiments
from sparse_exp.config.schema import (
    DatasetConfig,
    Experiment,
    HardwareConfig,
    ModelConfig,
    PathsConfig,
    RecipeConfig,
    RecoveryConfig,
    TrackerConfig,
)
from sparse_exp.errors import ConfigError, StageFailed
from sparse_exp.metrics.recovery import recovery_metrics
from sparse_exp.runs.directory import MANIFEST, Run
from sparse_exp.stages import baseline as recovery
from sparse_exp.stages.base import Outcome
from sparse_exp.stages.baseline import TAG, dense_experiment, read_baseline
from sparse_exp.stages.registry import STAGES


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(autouse=True)
def _here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def sparse(run: str, tracker: str = "none", **changes) -> Experiment:
    """An experiment that wants a baseline."""
    values = {
        "name": "tiny",
        "stages": ["fetch", "plan", "baseline", "train"],
        "model": ModelConfig(name="yolov5n", size="n", weights="scratch", sparsity=0.4),
        "dataset": DatasetConfig(name="digits", generator="digits", imgsz=64),
        "recipe": RecipeConfig(name="transfer", file="transfer.md", variables={"num_epochs": 1}),
        "recovery": RecoveryConfig("auto"),
        "hardware": HardwareConfig(name="cpu", engines=["onnxruntime"], cores=[1]),
        "tracker": TrackerConfig(backend=tracker, system_metrics=False),
        "paths": PathsConfig(output="out", run=run, mlflow="mlflow", cache="cache"),
    }
    return Experiment(**{**values, **changes})


def baseline_of(experiment: Experiment) -> dict:
    """Runs the experiment up to its own training; the facts of its baseline stage."""
    with suppress(StopHereError):
        experiments.run(experiment, {}, ["experiment=tiny", "recipe=transfer"])
    return manifest(experiment.paths.run)["stages"]["baseline"]["facts"]


class StopHereError(KeyboardInterrupt):
    """Ends a run like Ctrl-C where its own training would begin."""


def only_dense_runs_train(patch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the stages that take long; the names of the recipes that were trained."""
    names, real = [], STAGES["train"].run

    def train(context):
        if context.experiment.recipe.name != "dense":
            raise StopHereError
        names.append(context.experiment.recipe.name)
        return real(context)

    patch.setitem(STAGES, "train", replace(STAGES["train"], run=train))
    patch.setitem(STAGES, "plan", replace(STAGES["plan"], run=lambda _: Outcome()))  # it times trial steps
    return names


@pytest.fixture(autouse=True)
def trained(monkeypatch) -> list[str]:
    return only_dense_runs_train(monkeypatch)


def manifest(run: str | Path) -> dict:
    return json.loads((Path(run) / MANIFEST).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def first(place, new_database) -> dict:
    """The facts of the first run, which finds nothing and trains its counterpart, tracked in MLflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        (place / "mlflow").mkdir()
        shutil.copy(new_database, place / "mlflow")
        only_dense_runs_train(patch)
        return baseline_of(sparse("first", "mlflow"))


def test_the_counterpart_is_a_run_of_its_own_beside(first, place):
    assert first["origin"] == "trained"
    assert first["directory"] == "../first-dense"  # both may be moved
    assert first["checkpoint"] == "../first-dense/weights/best_dense.pt"
    dense = manifest("first-dense")
    assert dense["status"] == "FINISHED"
    assert list(dense["stages"]) == ["fetch", "plan", "baseline", "train", "evaluate"]
    assert dense["stages"]["evaluate"]["metrics"]["val/map50"] == first["map50"]
    assert dense["stages"]["evaluate"]["metrics"]["sparsity/prunable"] < 0.01
    assert dense["stages"]["evaluate"]["facts"]["epoch"] == 1  # as many images as the sparse run sees
    assert "recipe=dense" in dense["overrides"]
    assert "recipe=transfer" not in dense["overrides"]


def test_both_are_tracked_and_the_counterpart_carries_its_fingerprint(first, place):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/mlflow/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    by_name = {run.info.run_name: run for run in runs}
    assert by_name["tiny-dense"].info.status == "FINISHED"
    assert by_name["tiny"].info.status == "KILLED"  # by this test, where its own training would begin
    mark = manifest("first-dense")["stages"]["baseline"]["facts"]["dense_fingerprint"]
    assert by_name["tiny-dense"].data.tags[TAG] == mark
    assert TAG not in by_name["tiny"].data.tags
    assert by_name["tiny"].data.metrics["baseline/map50"] == first["map50"]


def test_the_log_of_the_run_goes_on_after_that_of_its_counterpart(first):
    log = Path("first/sparse_exp.log").read_text(encoding="utf-8")
    assert "Going on with the run itself." in log
    assert log.index("epoch 1 ") < log.index("Going on") < log.rindex("== train")
    assert "Going on" not in Path("first-dense/sparse_exp.log").read_text(encoding="utf-8")
    assert not [h for h in logging.getLogger("sparse_exp").handlers if isinstance(h, logging.FileHandler)]


@pytest.mark.parametrize(("tracker", "origin"), [("mlflow", "found in MLflow"), ("none", "found on disk")])
def test_a_second_run_finds_it_and_trains_none(first, trained, tracker, origin):
    facts = baseline_of(sparse(f"second-{tracker}", tracker))
    assert facts == {**first, "origin": origin}
    assert trained == []
    assert not Path(f"second-{tracker}-dense").exists()


def test_where_the_files_are_gone_mlflow_still_knows_the_result(first, trained):
    Path("moved").mkdir()
    shutil.move("first-dense", "moved/first-dense")
    try:
        facts = baseline_of(sparse("third", "mlflow"))
    finally:
        shutil.move("moved/first-dense", "first-dense")
    assert facts == {
        "map50": pytest.approx(first["map50"]),
        "directory": "",
        "checkpoint": None,
        "origin": "found in MLflow",
    }
    assert trained == []


class Wanted(Exception):
    """Instead of a training that takes seconds."""


@pytest.fixture
def no_training(monkeypatch):
    def refuse(context, dense, mark):
        raise Wanted(dense)

    monkeypatch.setattr(recovery, "_train", refuse)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"dataset": DatasetConfig(name="digits", generator="digits", imgsz=96)},
        {"recipe": RecipeConfig(name="transfer", file="transfer.md", variables={"num_epochs": 2})},
        {"model": ModelConfig(name="yolov5s", size="s", weights="scratch")},
    ],
)
def test_another_seed_data_length_or_model_has_another_counterpart(first, no_training, changes):
    with pytest.raises(StageFailed, match="Wanted"):
        baseline_of(sparse(f"other-{next(iter(changes))}", **changes))


@pytest.fixture
def changed(first, place):
    """A function that changes the manifest of the counterpart, for one test."""
    path = place / "first-dense" / MANIFEST
    text = path.read_text(encoding="utf-8")

    def change(**entries):
        content = json.loads(text)
        content["stages"]["evaluate"] |= entries.pop("evaluate", {})
        path.write_text(json.dumps({**content, **entries}), encoding="utf-8")

    yield change
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "evaluated",
    [{"metrics": {}}, {"facts": {"dense_fingerprint": "of another training"}}, {"facts": {}}],
)
def test_a_counterpart_that_was_not_evaluated_does_not_count(changed, no_training, evaluated):
    changed(status="KILLED", evaluate=evaluated)
    with pytest.raises(StageFailed, match="Wanted"):
        baseline_of(sparse("unfinished", overwrite=True))


def test_one_that_failed_after_its_evaluation_counts(changed, first, no_training):
    changed(status="FAILED")
    assert baseline_of(sparse("failed"))["checkpoint"] == first["checkpoint"]


def test_one_of_a_version_that_noted_its_fingerprint_elsewhere_counts_once_finished(
    changed, first, no_training
):
    changed(evaluate={"facts": {}})
    assert baseline_of(sparse("older"))["checkpoint"] == first["checkpoint"]


def test_a_dense_run_is_found_by_the_others_and_wants_none_itself(first, caplog):
    dense = sparse("dense", recipe=RecipeConfig(name="dense", file="dense.md", variables={"num_epochs": 1}))
    with caplog.at_level(logging.INFO):
        facts = baseline_of(dense)
    mark = manifest("first-dense")["stages"]["baseline"]["facts"]["dense_fingerprint"]
    assert facts == {"dense_fingerprint": mark}
    assert "this run is a baseline itself" in caplog.text


def test_of_a_recipe_that_trains_nothing_the_start_is_the_baseline(trained):
    recipe = RecipeConfig(name="oneshot", file="oneshot.md", oneshot=True)
    facts = baseline_of(sparse("oneshot", recipe=recipe))
    assert facts == {"map50": facts["map50"], "directory": "", "checkpoint": None, "origin": "the start"}
    assert 0 <= facts["map50"] < 0.2  # random weights
    assert trained == []


@pytest.fixture
def begun(monkeypatch) -> list[tuple[str, bool]]:
    """Where counterparts are run, and whether they go on there; none is trained."""
    found = []

    def begin(dense, overrides, sweep):
        found.append((Path(dense.paths.run).name, dense.resume == dense.paths.run))
        if not dense.resume:
            Run.create(Path(dense.paths.run), overwrite=False)
        raise StopHereError

    monkeypatch.setattr(experiments, "_run_nested", begin)
    return found


def test_a_counterpart_goes_on_where_it_was_begun_and_takes_no_directory_of_another_run(place, begun):
    other = place / "cut-dense" / MANIFEST
    other.parent.mkdir()
    other.write_text('{"stages": {}, "name": "another"}')
    for changes in ({}, {"resume": "cut"}, {"resume": "cut", "seed": 6}, {"seed": 6, "overwrite": True}):
        with pytest.raises(StopHereError):
            experiments.run(sparse("cut", **{"seed": 5, **changes}), {}, [])
    assert begun == [
        ("cut-dense-2", False),
        ("cut-dense-2", True),
        ("cut-dense-3", False),
        ("cut-dense-4", False),
    ]
    assert other.read_text() == '{"stages": {}, "name": "another"}'


def test_a_foreign_record_does_not_say_where_its_counterpart_is_trained(place, begun):
    with pytest.raises(StopHereError):
        experiments.run(sparse("foreign", seed=88), {}, [])
    (place / "elsewhere" / "theirs").mkdir(parents=True)
    file = place / "foreign" / MANIFEST
    record = json.loads(file.read_text())
    record["counterpart"]["directory"] = "../elsewhere/theirs"
    file.write_text(json.dumps(record))
    with pytest.raises(StopHereError):
        experiments.run(sparse("foreign", seed=88, resume="foreign"), {}, [])
    assert begun == [("foreign-dense", False), ("foreign-dense-2", False)]


def test_the_counterpart_differs_in_its_recipe_alone(place):
    ours = sparse("run", seed=7, overwrite=True, resume="run")
    dense = dense_experiment(ours, 12.5)
    assert (dense.resume, dense.overwrite) == (None, False)
    assert dense.recipe == RecipeConfig(name="dense", file="dense.md", variables={"num_epochs": 12.5})
    assert dense.recovery.baseline == "none"
    for part in ("model", "dataset", "trainer", "seed", "hardware", "tracker"):
        assert getattr(dense, part) == getattr(ours, part)
    assert ours.recipe.name == "transfer"
    assert ours.paths.run == "run"


def test_a_directory_can_be_given(first):
    facts = baseline_of(sparse("given", recovery=RecoveryConfig("first-dense")))
    assert facts == {**first, "origin": "given"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stages: stages.pop("evaluate"), "to be a run with a result"),
        (lambda stages: stages["evaluate"]["facts"].update(phase="pruned"), "a dense run, but got 'pruned'"),
        (lambda stages: stages["fetch"]["facts"].update(dataset="0123"), "data of the .* but got '0123'"),
    ],
)
def test_a_directory_that_is_no_baseline_is_refused(first, place, change, message):
    content = manifest("first-dense")
    change(content["stages"])
    folder = place / f"bad-{abs(hash(message))}"
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message) as error:
        baseline_of(sparse(f"{folder.name}-run", recovery=RecoveryConfig(str(folder))))
    assert "recovery.baseline" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_manifest_is_no_baseline(place):
    assert read_baseline(place / "nowhere", "given") is None
    (place / "broken").mkdir()
    (place / "broken" / MANIFEST).write_text("{")
    assert read_baseline(place / "broken", "given") is None


RESULT = {"deployed/onnxruntime/map50": 0.45, "deployed/deepsparse/map50": 0.54}


def test_recovery_is_deployed_over_dense():
    both = recovery_metrics({"map50": 0.6}, RESULT, ["onnxruntime", "deepsparse"])
    assert both == {
        "recovery/map50": pytest.approx(0.9),  # DeepSparse's, where it is there
        "recovery/onnxruntime/map50": pytest.approx(0.75),
        "recovery/deepsparse/map50": pytest.approx(0.9),
    }
    assert recovery_metrics({"map50": 0.6}, RESULT, ["onnxruntime"])["recovery/map50"] == pytest.approx(0.75)
    assert recovery_metrics({}, RESULT, ["onnxruntime"]) == {}
    assert recovery_metrics({"dense_fingerprint": "0"}, RESULT, ["onnxruntime"]) == {}


def test_a_baseline_that_finds_nothing_is_warned_of_once(caplog):
    assert recovery_metrics({"map50": 0.0}, RESULT, ["onnxruntime", "deepsparse"]) == {}
    (warning,) = caplog.records
    assert "mAP50 0" in warning.getMessage()
