"""Thirty behaviours that users of Hydra and MLflow expect, each shown by commands that they type."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import yaml
from command import Ended, command_line
from finished_run import pruned, save
from wheels import distributions, installed

from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.files import sha256_of, write_text
from sparse_exp.rerun import main as rerun
from sparse_exp.tracking.dashboard import free_port

__all__ = ["command_line", "distributions", "installed"]

pytestmark = pytest.mark.slow

SMOKE = [
    "experiment=smoke", "dataset.imgsz=64", "recipe.variables.num_epochs=1", "seed=7",
    "hardware.engines=[onnxruntime,openvino]", "tracker.system_metrics=false",
]  # fmt: skip
UNREGISTERED = ["tracker.register=null", "tracker.alias=null"]
JOBS = ["-m", "dataset=digits", "model.weights=scratch", "stages=[fetch]", "tracker.system_metrics=false"]
ENGINES = ("onnxruntime", "openvino")
PATIENCE_S = 600


@dataclass
class Place:
    """A directory to work in, with a cache beside it and nothing else of ours."""

    cwd: Path
    cache: Path

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        """Start a command in it: ``python WORDS``."""
        environment = {**os.environ, "SPARSE_EXP_CACHE": str(self.cache), "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        return subprocess.Popen(
            [sys.executable, *words], cwd=self.cwd, env={**environment, **variables}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
        )  # fmt: skip

    def run(self, *words: str, **variables: str) -> Ended:
        """``sx WORDS`` in a process of its own."""
        process = self.start("-m", "sparse_exp", *words, **variables)
        try:
            output = process.communicate(timeout=PATIENCE_S)[0]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Ended(process.returncode, (output.splitlines() or [""])[-1], output)

    def without(self, package: str) -> dict[str, str]:
        """The variables of a process to which a package is not installed."""
        folder = self.cache / f"without-{package}"
        write_text(folder / "sitecustomize.py", f"import sys\nsys.modules[{package!r}] = None\n")
        return {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}

    @property
    def database(self) -> Path:
        return self.cwd / "outputs" / "mlflow" / "mlflow.db"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    root = tmp_path_factory.mktemp("behaviours")
    (root / "cwd").mkdir()
    return Place(root / "cwd", root / "cache")


@pytest.fixture
def sx(place, monkeypatch, command_line):
    """``sx WORDS`` in this process, which has imported torch and MLflow already."""
    monkeypatch.chdir(place.cwd)
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(place.cache))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return command_line


@pytest.fixture(scope="module")
def run(place) -> Path:
    """A whole run, registered under an alias; do not change it."""
    words = ("tracker.register=tiny", "tracker.alias=best", "tracker.system_metrics=true", "paths.run=run")
    ended = place.run(*SMOKE, *words)
    assert ended.code == 0, ended.output
    return place.cwd / "run"


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def good(ended: Ended) -> str:
    assert ended.code == 0, ended.output + ended.error
    return ended.output


def composed(ended: Ended) -> dict:
    return yaml.safe_load(good(ended))


def mlflow(place: Place):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{place.database}")


def tracked(place: Place, run: Path):
    return mlflow(place).get_run(load(run / "manifest.json")["tracker_run_id"])


def family(database: Path, name: str) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """Name and status of a sweep's own run, and those of the runs below it by name."""
    below = "select run_uuid from tags where key = 'mlflow.parentRunId' and value = ?"
    with closing(sqlite3.connect(database)) as known:
        of_sweep = "select run_uuid, name, status from runs where name = ?"
        (parent, *its) = known.execute(of_sweep, [name]).fetchone()
        found = known.execute(f"select name, status from runs where run_uuid in ({below})", [parent])
        return tuple(its), sorted(found.fetchall())


def jobs(place: Place, sweep: str) -> list[str]:
    """The directories of a sweep's jobs."""
    return sorted(path.parent.name for path in place.cwd.glob(f"outputs/sweeps/{sweep}/*/manifest.json"))


# Command line and configuration


def test_1_a_wheel_in_an_empty_directory_lists_all_groups_and_imports_nothing_heavy(installed, tmp_path):
    command = [sys.executable, "-X", "importtime", installed / "bin" / "sparse-exp", "--help"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=True, timeout=PATIENCE_S,
    )  # fmt: skip
    for group in {path.parent.name for path in CONF_DIRECTORY.glob("*/*.yaml")} - {"hydra", "local"}:
        assert f"\n{group}: " in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sparse_exp.cli" in imported
    assert not imported & {"torch", "mlflow"}
    assert list(tmp_path.iterdir()) == []


def test_2_the_whole_configuration_is_printed(sx):
    shown = composed(sx("model=yolov5l", "recipe=transfer_quant", "--cfg", "job", "--resolve"))
    assert (shown["name"], shown["model"]["size"]) == ("yolov5l-trees-transfer_quant", "l")
    groups = {"model", "dataset", "recipe", "hardware", "trainer", "export", "tracker", "paths", "launcher"}
    assert groups <= set(shown)
    assert "${" not in yaml.safe_dump(shown)


@pytest.mark.parametrize(
    ("what", "shown"),
    [("searchpath", "structured://"), ("defaults-tree", "model: yolov5s"), ("plugins", "Hydra Plugins")],
)
def test_3_hydras_own_information(sx, what, shown):
    assert shown in good(sx("--info", what))


def test_4_a_model_that_there_is_not_names_those_that_there_are(sx):
    ended = sx("model=yolov9")
    assert ended.code == 1
    assert "yolov5l, yolov5m, yolov5n, yolov5s, yolov5x" in ended.error


@pytest.mark.parametrize(
    ("word", "named"), [("model.dept=1", "model.dept"), ("trainer.batch_size=abc", "whole number")]
)
def test_5_a_key_or_a_type_that_is_wrong_is_named(sx, word, named):
    ended = sx(word)
    assert ended.code == 1
    assert named in ended.error
    assert len(ended.error.splitlines()) == 1


def test_6_a_dry_run_prints_the_plan_or_all_errors_and_makes_nothing(sx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "stages: fetch" in " ".join(good(sx("experiment=smoke", "dry_run=true")).split())
    # a model to register and no MLflow; a teacher that is a baseline and none wanted
    wrong = ("tracker=none", "tracker.register=x", "recipe.teacher=baseline", "recovery.baseline=none")
    ended = sx("experiment=smoke", "dry_run=true", *wrong)
    assert ended.code == 1
    assert [line.startswith("Error: ") for line in ended.error.splitlines()] == [True, True]
    assert {"tracker.backend", "recovery.baseline=auto"} <= set(ended.error.replace(",", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_7_the_command_line_beats_the_preset_and_that_the_defaults(sx):
    words = ([], ["experiment=smoke"], ["experiment=smoke", "recipe.variables.num_epochs=9"])
    shown = [composed(sx(*more, "--cfg", "job"))["recipe"]["variables"]["num_epochs"] for more in words]
    assert shown[0] not in (3, 9)
    assert shown[1:] == [3, 9]


def test_8_own_options_without_a_fork(sx, tmp_path):
    write_text(tmp_path / "mine/model/mine.yaml", "defaults: [yolov5n]\nname: mine\nsparsity: 0.6\n")
    shown = composed(sx("--config-dir", str(tmp_path / "mine"), "model=mine", "--cfg", "job", "--resolve"))
    assert (shown["name"], shown["model"]["size"]) == ("mine-trees-transfer_quant", "n")
    if (CONF_DIRECTORY.parent / ".git").exists() and shutil.which("git"):
        ignored = ["git", "check-ignore", "--quiet", "conf/local/default.yaml"]
        assert subprocess.run(ignored, cwd=CONF_DIRECTORY.parent, check=False).returncode == 0


def test_9_every_yaml_composes(sx):
    files = [path.relative_to(CONF_DIRECTORY) for path in CONF_DIRECTORY.rglob("*.yaml")]
    options = [path for path in files if path.parts[0] not in ("config.yaml", "hydra", "local")]
    assert len(options) > 40
    for path in options:
        good(sx(f"{path.parts[0]}={'/'.join(path.with_suffix('').parts[1:])}", "--cfg", "job"))


COMPLETE = """
eval "$(sparse-exp -sc install=bash)"
COMP_LINE="sparse-exp model=" COMP_WORDS=(sparse-exp model=) COMP_CWORD=1
COMP_POINT=${#COMP_LINE}
$(complete -p sparse-exp | sed 's/.* -F \\([a-z_]*\\) .*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_10_the_shell_completes(installed, tmp_path):
    variables = {"PATH": f"{installed / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(installed)}
    done = subprocess.run(
        ["bash", "-c", COMPLETE], cwd=tmp_path, env={**os.environ, **variables},
        capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout.split() == [f"model=yolov5{size}" for size in "lmnsx"], done.stderr


# A run and its files


def test_11_what_is_in_the_directory_of_a_run(run, place):
    names = ("sparse_exp.log", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml")
    names += ("config.yaml", "manifest.json", "result.json", "environment.txt", "recipe.md", "report.html")
    assert [name for name in names if not (run / name).stat().st_size] == []
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 7
    assert load(run / "manifest.json")["status"] == "FINISHED"


def test_12_one_seed_gives_the_same_metrics_and_the_same_file(run, place):
    good(place.run(*SMOKE, "stages=[fetch,plan,train,evaluate,export]", "tracker=none", "paths.run=again"))
    again = place.cwd / "again"
    result, before = load(again / "result.json"), load(run / "result.json")
    names = [name for name in result if not name.startswith("time/")]
    assert {"val/map50", "sparsity/prunable"} <= set(names)
    assert {name: result[name] for name in names} == {name: before[name] for name in names}
    graphs = [onnx.load(str(each / "deployment/model.onnx")).graph for each in (run, again)]
    assert graphs[0] == graphs[1]  # the file itself names the run that it comes from


def test_13_the_named_stages_alone_on_a_checkpoint(run, place, sx):
    words = (f"checkpoint={run / 'weights/best_pruned_quant.pt'}", "tracker=none", "paths.run=two")
    good(sx(*SMOKE, "stages=[export,benchmark]", *words, "hardware.engines=[onnxruntime]"))
    assert list(load(place.cwd / "two/manifest.json")["stages"]) == ["export", "benchmark"]
    assert not (place.cwd / "two/weights").exists()


@pytest.fixture(scope="module")
def interrupted(place) -> tuple[Path, Ended]:
    """A run that Ctrl-C has ended while it trained, and how it ended; `test_15` goes on with it."""
    run = place.cwd / "interrupted"
    words = (*SMOKE, "stages=[fetch,plan,train]", "recipe.variables.num_epochs=6", f"paths.run={run}")
    process = place.start("-m", "sparse_exp", *words)
    try:
        end = time.monotonic() + PATIENCE_S
        while not (run / "weights/state.pt").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output = process.communicate(timeout=PATIENCE_S)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return run, Ended(process.returncode, "", output)


def started_with(cache: Path) -> Iterator[psutil.Process]:
    """Processes that are left of those that were started with a cache."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("SPARSE_EXP_CACHE") == str(cache):
                yield process


def test_14_ctrl_c(interrupted, place):
    run, ended = interrupted
    assert ended.code == 130
    assert "Traceback" not in ended.output
    assert tracked(place, run).info.status == load(run / "manifest.json")["status"] == "KILLED"
    assert list(started_with(place.cache)) == []


def test_15_a_run_is_gone_on_with_inside_its_training(interrupted, place, sx):
    run, _ = interrupted
    before, epochs = load(run / "manifest.json"), load(run / "history.json")
    output = good(sx(f"resume={run}"))
    assert "== fetch: finished before, kept" in output
    assert "Going on with the training after epoch" in output
    history = load(run / "history.json")
    assert history[: len(epochs)] == epochs  # with the times that they took then
    assert history[-1]["epoch"] == 6
    assert load(run / "manifest.json")["tracker_run_id"] == before["tracker_run_id"]
    assert tracked(place, run).info.status == "FINISHED"


def test_16_an_existing_run_is_not_overwritten_without_a_word(run, sx):
    before = sha256_of(run / "manifest.json")
    ended = sx(*SMOKE, "paths.run=run", "tracker=none")
    assert ended.code == 1
    assert "overwrite=true" in ended.error
    assert sha256_of(run / "manifest.json") == before


def test_17_verification_reports_and_refuses_a_dense_model_of_a_sparse_recipe(run, place, sx):
    result = load(run / "result.json")
    for engine in ENGINES:
        assert 0 <= result[f"verify/{engine}/score_mean"] < 0.1
    assert result["sparsity/onnx"] == pytest.approx(0.4, abs=0.01)  # the target of yolov5n
    assert result["quantized/convolutions"] == 60
    dense = place.cwd / "dense"
    shutil.copytree(run, dense)
    manifest = load(dense / "manifest.json")
    (dense / "manifest.json").write_text(json.dumps({**manifest, "tracker_run_id": None}))
    names = tuple(manifest["stages"]["fetch"]["facts"]["names"])
    save(dense / "weights/best_pruned_quant.pt", pruned(names, share=0.0), names, phase="pruned_quant")
    ended = sx(f"resume={dense}", "stages=[export,verify]", *UNREGISTERED)
    assert ended.code == 1
    assert "at least 40.00%" in ended.error
    assert load(dense / "manifest.json")["status"] == "FAILED"


def test_18_several_engines_are_measured_with_percentiles_and_conditions(run):
    rows = load(run / "benchmark.json")
    assert {(row["engine"], row["variant"]) for row in rows} == set(product(ENGINES, ("dense", "sparse")))
    conditions = ("batch", "cores", "streams", "imgsz", "cpu", "isa", "version", "precision", "started")
    for row in rows:
        assert row["latency_p25_ms"] <= row["latency_p50_ms"] <= row["latency_p75_ms"]
        assert [name for name in conditions if name not in row] == []
    assert len({(row["batch"], row["imgsz"], row["cores"]) for row in rows}) == 1


def test_19_an_engine_that_is_not_installed_is_named_with_what_to_install(place):
    ended = place.run(*SMOKE, "paths.run=none", "tracker=none", **place.without("openvino"))
    assert ended.code == 1
    assert "openvino" in ended.error
    assert "pip install" in ended.error
    assert not (place.cwd / "none").exists()


def test_20_a_stage_that_fails_is_named_with_its_reason_everywhere(run, place, sx):
    failing = place.cwd / "failing"
    shutil.copytree(run, failing)
    manifest = load(failing / "manifest.json")
    (failing / "manifest.json").write_text(json.dumps({**manifest, "tracker_run_id": None}))
    ended = sx(f"resume={failing}", "stages=[verify]", "export.score_atol=0", *UNREGISTERED)
    assert ended.code == 1
    reason = ended.error.removeprefix("Error: ")
    after, found = load(failing / "manifest.json"), tracked(place, failing)
    assert (after["status"], after["stage"], after["failure"]) == ("FAILED", "verify", reason)
    assert (found.info.status, found.data.tags["failure"]) == ("FAILED", reason)
    assert "Traceback (most recent call last)" in (failing / "sparse_exp.log").read_text()
    assert "Traceback" not in ended.output


# Sweeps


def test_21_a_sweep_is_one_parent_with_numbered_jobs(place, sx):
    words = ("model=yolov5s,yolov5l", "recipe=dense,transfer_quant", "sweep.name=four")
    assert "4 of 4 jobs finished" in good(sx(*JOBS, *words))
    names = [f"yolov5{size}-digits-{recipe}" for size in "sl" for recipe in ("dense", "transfer_quant")]
    assert jobs(place, "four") == [f"{number}-{name}" for number, name in enumerate(names)]
    parent, children = family(place.database, "four")
    assert parent == ("four", "FINISHED")
    with closing(sqlite3.connect(place.database)) as known:
        of_sweep = "select count(*) from tags where key = 'sweep' and value = 'four'"
        assert known.execute(of_sweep).fetchone() == (5,)  # its own run and those below
    assert children == sorted((name, "FINISHED") for name in names)


def test_22_options_by_pattern(place, sx):
    good(sx(*JOBS, "model=glob(*)", "tracker=none", "sweep.name=all"))
    assert jobs(place, "all") == [f"{i}-yolov5{size}-digits-transfer_quant" for i, size in enumerate("lmnsx")]


PARETO = [
    "-m", *SMOKE, "sweep=pareto", "sweep.name=search", "tracker=none", "model=yolov5n", "recipe=transfer",
    "recipe.pattern=unstructured", "dataset.imgsz=64", "sweep.objectives=[map50,sparsity/prunable]",
    "stages=[fetch,plan,train,evaluate]",
]  # fmt: skip


def test_23_a_search_by_named_results(place, sx):
    pytest.importorskip("optuna", reason="the extra search is not installed")
    misspelt = sx(*PARETO, "sweep.objectives=[map51]", "sweep.trials=1")
    assert misspelt.code == 1
    assert "map51" in misspelt.error
    assert "Nearest: map50" in misspelt.error
    assert jobs(place, "search") == []
    good(sx(*PARETO, "sweep.trials=1"))
    assert len(jobs(place, "search")) == 1
    assert (place.cwd / "outputs/sweeps/search/study.db").is_file()


def test_24_the_study_goes_on_from_its_storage(place, sx):
    if not jobs(place, "search"):
        pytest.skip("there is no study")
    first = place.cwd / "outputs/sweeps/search" / jobs(place, "search")[0] / "manifest.json"
    before = load(first)["stages"]
    good(sx(*PARETO, "sweep.trials=2"))
    assert len(jobs(place, "search")) == 2
    assert load(first)["stages"] == before


@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_25_jobs_in_parallel_on_a_fresh_database(place, tmp_path, launcher):
    pytest.importorskip(launcher, reason=f"the extra {launcher} is not installed")
    fresh = Place(tmp_path, place.cache)
    words = ("model=yolov5n,yolov5s", f"launcher={launcher}", "launcher.jobs=2", "sweep.name=both")
    output = good(fresh.run(*JOBS, *words))
    assert "2 of 2 jobs finished" in output
    assert "locked" not in output
    parent, children = family(fresh.database, "both")
    names = [f"yolov5{size}-digits-transfer_quant" for size in "ns"]
    assert (parent, children) == (("both", "FINISHED"), [(name, "FINISHED") for name in names])


def test_26_of_one_bad_job_the_others_finish(place, sx):
    ended = sx(*JOBS, "model=yolov5n", "trainer.lr=0.001,5,0.002", "sweep.name=gap")
    assert ended.code == 1
    assert "2 of 3 jobs finished" in ended.error
    assert "1-yolov5n-digits-transfer_quant FAILED: Expected trainer.lr" in ended.output
    parent, children = family(place.database, "gap")
    assert parent == ("gap", "FAILED")
    assert sorted(status for _, status in children) == ["FAILED", "FINISHED", "FINISHED"]


# Tracking


@contextmanager
def mlflow_ui(place: Place) -> Iterator[str]:
    """MLflow's own command on our database."""
    port, store = free_port(), f"sqlite:///{place.database}"
    words = ["-m", "mlflow", "ui", "--backend-store-uri", store, "--port", str(port), "--workers", "1"]
    process = place.start(*words, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    try:
        end = time.monotonic() + PATIENCE_S
        while True:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate()


def test_27_mlflows_own_ui_shows_everything(run, place, sx):
    experiment = tracked(place, run).info.experiment_id
    asked = json.dumps({"experiment_ids": [experiment], "max_results": 1000}).encode()
    with mlflow_ui(place) as address:
        path = f"{address}/api/2.0/mlflow/runs/search"
        request = urllib.request.Request(path, asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            shown = {one["info"]["run_id"]: one["info"]["status"] for one in json.load(response)["runs"]}
    with closing(sqlite3.connect(place.database)) as known:
        assert shown == dict(known.execute("select run_uuid, status from runs").fetchall())
    assert shown[load(run / "manifest.json")["tracker_run_id"]] == "FINISHED"
    assert not (place.cwd / "mlruns").exists()


def test_27_the_environment_names_the_store(place, sx, monkeypatch, new_database, tmp_path):
    shutil.copy(new_database, tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    good(sx(*SMOKE, "stages=[fetch]", "name=elsewhere", "paths.run=elsewhere"))
    with closing(sqlite3.connect(tmp_path / "other.db")) as known:
        assert known.execute("select name from runs").fetchall() == [("elsewhere",)]
    assert not (place.cwd / "mlruns").exists()


def test_27_without_tracking_mlflow_is_not_needed(place):
    words = (*SMOKE, "stages=[fetch]", "tracker=none", "paths.run=untracked")
    good(place.run(*words, **place.without("mlflow")))


def test_28_what_is_tracked_of_a_run(run, place):
    found, client = tracked(place, run), mlflow(place)
    assert (found.data.params["model.size"], found.data.params["trainer.augment.mosaic"]) == ("n", "0.5")
    history = load(run / "history.json")
    steps = {metric.step for metric in client.get_metric_history(found.info.run_id, "loss/box")}
    assert steps == {round(100 * row["epoch"]) for row in history}
    assert [name for name in found.data.metrics if name.startswith("system/")]
    digest = load(run / "manifest.json")["stages"]["fetch"]["facts"]["dataset"]
    inputs = {one.dataset.name: one.dataset.digest for one in found.inputs.dataset_inputs}
    assert set(inputs) == {"digits/train", "digits/val", "digits/test"}
    assert all(digest.startswith(each) for each in inputs.values())
    tags = ("model", "recipe", "dataset", "sparse_exp.version")
    assert [found.data.tags[name] for name in tags[:3]] == ["yolov5n", "transfer_quant", "digits"]
    assert set(tags) <= set(found.data.tags)
    if (CONF_DIRECTORY.parent / ".git").exists() and shutil.which("git"):
        assert {"mlflow.source.git.commit", "git.dirty"} <= set(found.data.tags)
    kept = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "environment.txt", "report.md", "manifest.json"} <= kept


def test_29_the_deployed_model_is_loaded_back_by_its_alias(run, place, monkeypatch):
    import mlflow as library

    address = f"sqlite:///{place.database}"
    library.set_registry_uri(address)
    library.set_tracking_uri(address)
    try:
        model = library.pyfunc.load_model("models:/tiny@best")
        images = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64), dtype=np.uint8)
        schema = model.metadata.signature.inputs.to_dict()
        assert (schema[0]["name"], schema[0]["tensor-spec"]["dtype"]) == ("images", "uint8")
        (found,) = model.predict({"images": images}).values()
    finally:
        library.set_registry_uri(None)
        library.set_tracking_uri(None)
    import onnxruntime

    session = onnxruntime.InferenceSession(run / "deployment/model.onnxruntime.onnx")
    (expected,) = session.run(None, {session.get_inputs()[0].name: images})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_30_a_past_run_is_made_again_and_what_differs_is_named(run, place, sx, monkeypatch, capsys):
    past = place.cwd / "past"
    past.mkdir()
    manifest = load(run / "manifest.json")
    for then in manifest["environments"].values():
        then["packages"] = ["numpy==0.1", *(line for line in then["packages"] if "numpy==" not in line)]
        then["code"]["sources"], then["host"]["cpu"] = "0" * 16, "Z80"
    manifest["stages"]["fetch"]["facts"]["dataset"] = "0" * 64
    (past / "manifest.json").write_text(json.dumps(manifest))
    for name in ("config.yaml", "environment.txt"):
        shutil.copy(run / name, past)
    monkeypatch.setattr(sys, "argv", ["rerun", str(past), "--dry-run"])
    assert rerun() == 0
    shown = capsys.readouterr().out
    for word in ("code", "packages", "numpy", "0.1", "data", "host", "Z80"):
        assert word in shown
    words = ["stages=[fetch]", "paths.run=rerun", *UNREGISTERED]
    monkeypatch.setattr(sys, "argv", ["rerun", str(past), *words])
    assert rerun() == 0
    again = place.cwd / "rerun"
    assert load(again / "manifest.json")["status"] == "FINISHED"
    assert yaml.safe_load((again / "config.yaml").read_text())["seed"] == 7
