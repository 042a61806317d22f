"""The whole run on generated digits: its files, what MLflow knows of it, and how it can be gone on with."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import onnx
import psutil
import pytest
from percentiles import needs_many_inferences

from sparse_exp import cli
from sparse_exp.files import sha256_of
from sparse_exp.resolve import rebuild
from sparse_exp.stages import registry
from sparse_exp.stages.names import certain_names, expected_names

EXPERIMENT = "digits-test"
SMOKE = ["experiment=smoke", f"tracker.experiment={EXPERIMENT}"]
FILES = {
    "sparse_exp.log", "config.yaml", "recipe.md", "manifest.json", "result.json", "environment.txt",
    "report.md", "report.html", "history.json", "benchmark.json", "benchmark.csv", "why.json", "sparsity.csv",
    "classes.json", "first_outputs.npz", ".manifest.former.json",
    ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml",
    "weights/last.pt", "weights/best_pruned.pt", "weights/best_pruned_quant.pt",
    "deployment/model.onnx", "deployment/model.qdq.onnx", "deployment/model.onnxruntime.onnx",
    "deployment/dense.onnx",
}  # fmt: skip
PICTURES = {
    "training", "precision_recall", "layer_sparsity", "sizes", "throughput", "latency", "accuracy_speed",
    "detections", "confusion",
}  # fmt: skip
STAGES = ["fetch", "plan", "baseline", "train", "evaluate", "export", "verify", "benchmark", "report"]
ENGINES = ["deepsparse", "onnxruntime", "openvino"]


@dataclass
class Place:
    """A directory to work in, with a cache beside it."""

    cwd: Path
    cache: Path

    def popen(self, *words: str, **options) -> subprocess.Popen[str]:
        environment = {**os.environ, "SPARSE_EXP_CACHE": str(self.cache)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        # In a shell's background Ctrl-C is ignored, which children inherit.
        return subprocess.Popen(
            [sys.executable, "-m", "sparse_exp", *words], cwd=self.cwd, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
        )  # fmt: skip

    def run(self, *words: str) -> tuple[int, str]:
        with self.popen(*words) as process:
            try:
                output, _ = process.communicate(timeout=400)
            except BaseException:
                process.kill()
                raise
        return process.returncode, output


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    root = tmp_path_factory.mktemp("digits_run")
    (root / "cwd").mkdir()
    return Place(root / "cwd", root / "cache")


@pytest.fixture(scope="module")
def smoke(place):
    """The run, its directory and its output; everything else here looks at it."""
    code, output = place.run(*SMOKE, "paths.run=run")
    assert code == 0, output
    return place.cwd / "run", output


@pytest.fixture
def again(alone):
    """Calls the command line with the words that the run was started with, and more."""
    return lambda *words: alone(*SMOKE, *words)


@pytest.fixture
def alone(place, monkeypatch, capsys):
    """Calls the command line in this process, where torch is imported already."""
    monkeypatch.chdir(place.cwd)
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(place.cache))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logger = logging.getLogger("sparse_exp")
    state = logger.handlers[:], logger.propagate, logger.level

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["sparse-exp", *words])
        code, error = 0, ""
        try:
            cli.main()
        except SystemExit as exit_:
            code, error = (exit_.code, "") if isinstance(exit_.code, int) else (1, str(exit_.code))
        printed = capsys.readouterr()
        return code, printed.out + printed.err + error

    yield call
    logger.handlers[:], logger.propagate = state[0], state[1]
    logger.setLevel(state[2])


@pytest.fixture(scope="module")
def client(place):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{place.cwd}/outputs/mlflow/mlflow.db")


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def tracked(client, run: Path):
    return client.get_run(load(run / "manifest.json")["tracker_run_id"])


def test_the_names_of_the_result_are_known_before(smoke):
    run, _ = smoke
    experiment, _ = rebuild((run / "config.yaml").read_text(encoding="utf-8"), [])
    result = load(run / "result.json")
    names = load(run / "manifest.json")["stages"]["fetch"]["facts"]["names"]
    by_class = {name for name in result if name.startswith("class/")}
    assert {name.split("/")[1] for name in by_class} <= set(names)
    measured = set(result) - by_class
    assert certain_names(experiment) <= measured <= expected_names(experiment)
    not_sure = {
        name for name in measured if name.startswith(("test/map50", "size/qdq/", "size/onnxruntime/"))
    }
    percentiles = set(filter(needs_many_inferences, measured))
    assert measured - certain_names(experiment) == not_sure | percentiles


def test_files_of_a_run(smoke):
    run, _ = smoke
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert found == FILES | {f"plots/{name}.png" for name in PICTURES}  # and nothing half-written


def test_manifest(smoke):
    run, _ = smoke
    manifest = load(run / "manifest.json")
    assert manifest["status"] == "FINISHED"
    assert manifest["failure"] is None
    assert list(manifest["stages"]) == STAGES
    assert manifest["overrides"] == [*SMOKE, "paths.run=run"]
    for stage in manifest["stages"].values():
        assert {name: sha256_of(run / name) for name in stage["outputs"]} == stage["outputs"]
    assert "deployment/model.onnx" in manifest["stages"]["export"]["outputs"]
    assert {"weights/best_pruned_quant.pt", "recipe.md"} <= set(manifest["stages"]["train"]["outputs"])


def test_result(smoke):
    run, _ = smoke
    result = load(run / "result.json")
    expected = {"val/map50", "val/map50_95", "sparsity/prunable", "sparsity/total", "sparsity/onnx"}
    expected |= {f"deployed/{engine}/map50" for engine in ENGINES}
    expected |= {
        f"size/{name}_mb" for name in ("checkpoint", "onnx", "onnx_gzip", "dense_onnx", "dense_onnx_gzip")
    }
    numbers = ("items_per_s", "latency_p50_ms", "spread", "peak_rss_mb")
    expected |= {f"benchmark/{e}/{v}/b1/{n}" for e in ENGINES for v in ("dense", "sparse") for n in numbers}
    expected |= {f"time/{stage}_s" for stage in STAGES} | {"weights/origin"}
    assert expected <= set(result)
    assert result["weights/origin"] == "scratch"
    assert result["quantized/convolutions"] == result["quantizable/convolutions"] == 60
    assert result["sparsity/prunable"] == pytest.approx(0.40, abs=1e-3)  # yolov5n's target
    assert result["sparsity/onnx"] >= result["sparsity/prunable"] - 1e-9
    assert result["size/onnx_mb"] < 0.5 * result["size/dense_onnx_mb"]
    for engine in ENGINES:
        assert result[f"deployed/{engine}/map50"] == pytest.approx(result["val/map50"], abs=0.01)
        assert result[f"benchmark/{engine}/sparse/b1/items_per_s"] > 0


def test_a_row_of_the_benchmark_has_accuracy_speed_and_size_together(smoke):
    run, _ = smoke
    result, rows = load(run / "result.json"), load(run / "benchmark.json")
    assert {(row["engine"], row["variant"]) for row in rows} == set(product(ENGINES, ("dense", "sparse")))
    for row in rows:
        assert row["items_per_s"] == result[f"benchmark/{row['engine']}/{row['variant']}/b1/items_per_s"]
        assert row["size_mb"] == pytest.approx(
            (run / "deployment" / row["model"]).stat().st_size / 1e6, abs=1e-3
        )
        deployed = result[f"deployed/{row['engine']}/map50"] if row["variant"] == "sparse" else None
        assert row.get("map50") == deployed  # the dense network has initial weights: nothing is claimed of it
    assert {row["precision"] for row in rows if row["variant"] == "sparse"} == {"int8"}


def test_history_follows_the_plan(smoke):
    run, _ = smoke
    history = load(run / "history.json")
    assert [(row["epoch"], row["phase"]) for row in history] == [
        (1, "pruned"),
        (2, "pruned"),
        (3, "pruned_quant"),
    ]
    assert {row["sparsity/prunable"] for row in history} == {history[0]["sparsity/prunable"]}


def test_report_and_its_pictures(smoke):
    run, _ = smoke
    text = (run / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert {Path(link).stem for link in linked} == PICTURES
    for link in linked:
        assert (run / link).read_bytes().startswith(b"\x89PNG")
        assert (run / link).stat().st_size > 5000
    assert "pruned to 40% zeros" in " ".join(text.split())
    assert " ".join(["python -m sparse_exp", *SMOKE]) in text


def test_console_and_log(smoke):
    run, output = smoke
    assert "Traceback" not in output
    assert "Report: run/report.html" in output.splitlines()[-1]
    for stage in STAGES:
        assert f"== {stage}\n" in output
    log = (run / "sparse_exp.log").read_text(encoding="utf-8")
    assert "Plan" in log
    assert "items/s" in log
    environment = (run / "environment.txt").read_text(encoding="utf-8")
    assert environment.startswith(f"python=={sys.version.split()[0]}\n")
    assert re.search(r"^torch==\d", environment, re.MULTILINE)


def test_nothing_lies_elsewhere(smoke, place):
    assert {path.name for path in place.cwd.iterdir()} == {"run", "outputs"}  # no mlruns/, no sparse_logs/
    assert {path.name for path in (place.cwd / "outputs").iterdir()} == {"mlflow"}


def test_mlflow_has_one_finished_run_with_flat_params(smoke, client, place):
    run, _ = smoke
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment.artifact_location == (place.cwd / "outputs/mlflow/artifacts").as_uri()
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_id == load(run / "manifest.json")["tracker_run_id"]
    assert found.info.run_name == "yolov5n-digits-transfer_quant"
    params = found.data.params
    assert params["model.size"] == "n"
    assert params["recipe.variables.num_epochs"] == "3.0"
    assert params["hardware.engines"] == '["deepsparse", "onnxruntime", "openvino"]'
    assert params["trainer.augment.mosaic"] == "0.5"


@pytest.mark.parametrize("name", ["loss/box", "loss/obj", "loss/cls", "lr", "val/map50", "sparsity/prunable"])
def test_mlflow_has_metrics_of_each_epoch(smoke, client, name):
    run, _ = smoke
    history = client.get_metric_history(tracked(client, run).info.run_id, name)
    epochs = load(run / "history.json")
    by_step = {}
    for metric in sorted(history, key=lambda metric: metric.timestamp):
        by_step.setdefault(metric.step, metric.value)  # a final metric may follow at the last step
    assert by_step == {round(100 * row["epoch"]): pytest.approx(row[name]) for row in epochs}


def test_mlflow_has_the_result_and_it_wins_over_the_epochs(smoke, client):
    run, _ = smoke
    found = tracked(client, run)
    result = load(run / "result.json")
    for name, value in result.items():
        if isinstance(value, float | int):
            assert found.data.metrics[name] == pytest.approx(value, abs=1e-3), name
    history = client.get_metric_history(found.info.run_id, "val/map50")
    assert len(history) == 4
    latest = max(history, key=lambda metric: metric.timestamp)
    assert latest.step == max(metric.step for metric in history)  # which MLflow shows


def test_mlflow_has_tags_and_inputs(smoke, client):
    run, _ = smoke
    found = tracked(client, run)
    tags = found.data.tags
    digest = load(run / "manifest.json")["stages"]["fetch"]["facts"]["dataset"]
    wanted = {"model": "yolov5n", "recipe": "transfer_quant", "dataset": "digits", "hardware": "cpu"}
    wanted |= {"weights/origin": "scratch", "dataset.digest": digest, "run.directory": str(run)}
    assert {name: tags.get(name) for name in wanted} == wanted
    assert tags["host.cpu"]
    root = Path(cli.__file__).parents[1]
    if (root / ".git").exists() and shutil.which("git"):
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        assert tags["mlflow.source.git.commit"] == head.stdout.strip()
        assert tags["git.dirty"] in ("true", "false")
    inputs = {one.dataset.name: one.dataset for one in found.inputs.dataset_inputs}
    assert set(inputs) == {"digits/train", "digits/val", "digits/test"}
    assert all(digest.startswith(dataset.digest) for dataset in inputs.values())
    assert any(name.startswith("system/") for name in found.data.metrics)


def test_mlflow_has_the_artifacts(smoke, client):
    run, _ = smoke
    run_id = tracked(client, run).info.run_id
    found = {
        item.path
        for folder in (None, "plots", "deployment")
        for item in client.list_artifacts(run_id, folder)
    }
    assert {
        "config.yaml",
        "recipe.md",
        "environment.txt",
        "report.md",
        "result.json",
        "manifest.json",
    } <= found
    assert {f"deployment/{name}.onnx" for name in ("model", "model.qdq", "model.onnxruntime")} == {
        name for name in found if name.startswith("deployment/")
    }
    assert {f"plots/{name}.png" for name in PICTURES} <= found
    kept = Path(client.download_artifacts(run_id, "deployment/model.onnx"))
    assert sha256_of(kept) == sha256_of(run / "deployment/model.onnx")


@pytest.mark.slow
def test_only_the_named_stages_run_on_a_checkpoint(smoke, again):
    run, _ = smoke
    checkpoint = run / "weights" / "best_pruned_quant.pt"
    words = ["stages=[export,benchmark]", f"checkpoint={checkpoint}", "paths.run=second", "tracker=none"]
    code, output = again(*words, "hardware.engines=[onnxruntime]")
    assert code == 0, output
    second = run.parent / "second"
    assert list(load(second / "manifest.json")["stages"]) == ["export", "benchmark"]
    assert not (second / "weights").exists()
    assert {path.name for path in (second / "deployment").iterdir()} == {
        path.name for path in (run / "deployment").iterdir()
    }
    # One checkpoint gives one file, whoever exports it, but for the name of the run in it.
    files = [onnx.load(str(one / "deployment" / "model.onnx")) for one in (run, second)]
    assert {entry.key for entry in files[0].metadata_props if entry not in files[1].metadata_props} == {"run"}
    assert files[0].graph == files[1].graph
    names = {
        name.rpartition("/")[0] for name in load(second / "result.json") if name.startswith("benchmark/")
    }
    assert names == {f"benchmark/onnxruntime/{variant}/b1" for variant in ("dense", "sparse")}
    shutil.rmtree(second)


def test_resume_keeps_what_is_finished(smoke, again, client):
    run, _ = smoke
    before = load(run / "manifest.json")
    times = {path: path.stat().st_mtime_ns for path in (run / "deployment").iterdir()}
    code, output = again(f"resume={run}")
    assert code == 0, output
    for stage in STAGES:
        assert f"== {stage}: finished before, kept" in output
    after = load(run / "manifest.json")
    assert after["stages"] == before["stages"]
    assert after["tracker_run_id"] == before["tracker_run_id"]
    assert times == {path: path.stat().st_mtime_ns for path in (run / "deployment").iterdir()}
    (found,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert found.info.status == "FINISHED"


def test_resume_alone_goes_on_with_the_run_as_it_was_configured(smoke, alone, client):
    run, _ = smoke
    recorded = ("config.yaml", "recipe.md", "result.json", ".hydra/config.yaml", ".hydra/hydra.yaml",
                ".hydra/overrides.yaml", "report.md")  # fmt: skip
    before, manifest = {name: (run / name).read_bytes() for name in recorded}, load(run / "manifest.json")
    code, output = alone(f"resume={run}")
    assert code == 0, output
    for stage in STAGES:
        assert f"== {stage}: finished before, kept" in output
    after = load(run / "manifest.json")
    for key in ("stages", "overrides", "name", "tracker_run_id", "status"):
        assert after[key] == manifest[key]
    assert {name: (run / name).read_bytes() for name in recorded} == before
    (found,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert found.data.params["model.name"] == "yolov5n"


def test_a_failing_stage_ends_the_run_with_its_reason(smoke, again, client):
    run, _ = smoke
    copy = run.parent / "copy"
    shutil.copytree(run, copy)
    manifest = load(copy / "manifest.json")
    (copy / "manifest.json").write_text(json.dumps({**manifest, "tracker_run_id": None}))
    words = ["stages=[verify]", "export.score_atol=0", "hardware.engines=[openvino]"]
    code, output = again(
        f"resume={copy}", *words, "tracker.experiment=failing", "tracker.system_metrics=false"
    )
    assert code == 1
    assert "Traceback" not in output
    reason = output.strip().splitlines()[-1].removeprefix("Error: ")
    assert "score_mean of openvino" in reason
    after = load(copy / "manifest.json")
    assert (after["status"], after["stage"], after["failure"]) == ("FAILED", "verify", reason)
    found = tracked(client, copy)
    assert found.info.status == "FAILED"
    assert found.data.tags["failure"] == reason
    log = (copy / "sparse_exp.log").read_text(encoding="utf-8")
    assert "Traceback" in log
    assert reason in log
    shutil.rmtree(copy)


def test_an_unforeseen_error_is_one_line_too(place, again, monkeypatch):
    def breaks(context):
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setitem(registry.STAGES, "fetch", replace(registry.STAGES["fetch"], run=breaks))
    code, output = again("stages=[fetch]", "tracker=none", "paths.run=broken")
    broken = place.cwd / "broken"
    assert code == 1
    assert "Traceback" not in output
    error = output.strip().splitlines()[-1]
    assert error.startswith("Error: The stage fetch failed: ZeroDivisionError: division by zero")
    assert str(broken / "sparse_exp.log") in error
    assert "ZeroDivisionError: division by zero\nand more" in (broken / "sparse_exp.log").read_text()
    assert load(broken / "manifest.json")["status"] == "FAILED"
    shutil.rmtree(broken)


def test_ctrl_c_that_a_library_turns_into_an_error(place, again, monkeypatch):
    def saves(context):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 4863552 vs 4863448")  # as torch.save does

    monkeypatch.setitem(registry.STAGES, "fetch", replace(registry.STAGES["fetch"], run=saves))
    code, output = again("stages=[fetch]", "tracker=none", "paths.run=saving")
    assert code == 130
    assert "Error" not in output
    assert load(place.cwd / "saving" / "manifest.json")["status"] == "KILLED"
    shutil.rmtree(place.cwd / "saving")


@pytest.mark.slow
def test_one_seed_gives_the_same_metrics(smoke, place):
    run, _ = smoke
    stages = "stages=[fetch,plan,train]"
    code, output = place.run(*SMOKE, stages, "tracker=none", "paths.run=third")
    assert code == 0, output
    third = place.cwd / "third"
    measured = ("images_per_s", "seconds", "ended")
    first, second = (
        [
            {name: value for name, value in row.items() if name not in measured}
            for row in load(path / "history.json")
        ]
        for path in (run, third)
    )
    assert first == second
    shutil.rmtree(third)


def belonging_to(cache: Path) -> list[psutil.Process]:
    """Processes that were started with this cache."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SPARSE_EXP_CACHE") == str(cache):
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


@pytest.mark.slow
def test_ctrl_c_during_training(smoke, place, client):
    words = ["recipe.variables.num_epochs=500", "paths.run=killed", "tracker.experiment=killed"]
    killed = place.cwd / "killed"
    with place.popen(*SMOKE[:1], *words) as process:
        try:
            deadline = time.monotonic() + 120
            while not (killed / "weights" / "last.pt").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in output
    manifest = load(killed / "manifest.json")
    assert (manifest["status"], manifest["stage"]) == ("KILLED", "train")
    assert tracked(client, killed).info.status == "KILLED"
    assert belonging_to(place.cache) == []
    assert not [path for path in killed.rglob("*") if ".part" in path.name or path.name.startswith(".last")]
    shutil.rmtree(killed)


def test_sigterm_ends_a_run_as_ctrl_c_does():
    from sparse_exp.experiment import _terminated_as_interrupted

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _terminated_as_interrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
