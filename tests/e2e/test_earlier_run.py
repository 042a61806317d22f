"""A run that an earlier version made is read by everything that reads runs, and can be gone on with.

tests/data/README.md says how it was made and what of it is not kept.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from command import command_line

from sparse_exp import rerun
from sparse_exp.compare import __main__ as compare
from sparse_exp.export.networks import initial_network
from sparse_exp.export.onnx import FileForm, export_float
from sparse_exp.files import sha256_of
from sparse_exp.predict import __main__ as predict
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.runs.directory import LOCK
from sparse_exp.zoo import __main__ as zoo

__all__ = ["command_line"]
ARCHIVE = Path(__file__).parents[1] / "data" / "run-0.1.0.tar.xz"
RUN = Path("outputs/runs/2026-11-30/11-58-30-yolov5n-digits-transfer_quant")
DENSE = "deployment/dense.onnx"


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The directory that the run was started in; do not change it."""
    root = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    put_back_dense(root / RUN)
    return root


def put_back_dense(run: Path) -> None:
    """Export the dense network with initial weights as the export stage does, and enter it as its output."""
    model, checkpoint = restore(run / "weights" / "best_pruned_quant.pt")
    export_float(initial_network(model), run / DENSE, FileForm(96, opset=13, names=checkpoint.names))
    manifest = load(run / "manifest.json")
    manifest["stages"]["export"]["outputs"][DENSE] = sha256_of(run / DENSE)
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def earlier(unpacked, cache, tmp_path, monkeypatch) -> Path:
    """The run's directory, relative to the working directory, in a copy of its own."""
    shutil.copytree(unpacked, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(cache))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # Another version does all stages once more, as their fingerprints say. Here the format is what counts.
    monkeypatch.setattr("sparse_exp.stages.fingerprint.__version__", load(RUN / "manifest.json")["version"])
    return RUN


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the main function of a command, and returns what it printed."""

    def run(main, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        assert main() == 0
        return capsys.readouterr().out

    return run


def test_what_the_archive_lacks_is_made_as_it_was(unpacked):
    result = load(unpacked / RUN / "result.json")
    assert (unpacked / RUN / DENSE).stat().st_size / 1e6 == pytest.approx(
        result["size/dense_onnx_mb"], rel=0.01
    )


def test_compare_shows_its_numbers(earlier, call):
    result = load(earlier / "result.json")
    words = ["--x", "items_per_s", "--y", "size", "--best", "sparsity/onnx>=0.99"]
    found = json.loads(call(compare.main, "outputs", *words, "--json"))
    (row,) = found["runs"]
    assert (row["place"], row["status"]) == (str(earlier), "FINISHED")
    assert set(row["metrics"]) == {
        "benchmark/onnxruntime/sparse/b1/items_per_s", "size/onnx_gzip_mb", "sparsity/onnx",
    }  # fmt: skip
    assert row["metrics"] == {name: result[name] for name in row["metrics"]}
    again = found["best"]["command"].split()
    assert again[:3] == ["python", "-m", "sparse_exp"]
    assert {word.strip("'") for word in again[3:]} == set(load(earlier / "manifest.json")["overrides"])


def test_predict_runs_its_files(earlier, call, digits):
    """In both engines the same, as the run has verified."""
    picture, found = str(digits.splits["val"][0].image), {}
    names = load(earlier / "manifest.json")["stages"]["fetch"]["facts"]["names"]
    for engine, file in (
        ("onnxruntime", "deployment/model.qdq.onnx"),
        ("torch", "weights/best_pruned_quant.pt"),
    ):
        words = ["--engine", engine, "--conf", "0", "--max-det", "20", "--multi-label", "--no-pictures"]
        call(predict.main, earlier, picture, *words, "--cores", "1", "--out", engine)
        said = load(Path(engine) / "predictions.json")
        assert Path(said["model"]["file"]).resolve() == (earlier / file).resolve()
        assert (said["model"]["engine"], said["model"]["imgsz"]) == (engine, 96)
        assert said["model"]["names"] == names
        found[engine] = said["images"][0]["detections"]
    assert len(found["torch"]) == len(found["onnxruntime"]) == 20
    first = {engine: rows[0] for engine, rows in found.items()}
    assert first["torch"] == pytest.approx(first["onnxruntime"], abs=1e-4)


def test_rerun_reads_its_record(earlier, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    before = {path: path.stat().st_mtime_ns for path in Path("outputs").rglob("*")}
    said = call(rerun.main, earlier, "--dry-run")
    assert f"Not as it was for {earlier}" in said
    assert (
        load(earlier / "manifest.json")["conditions"]["code"]["sources"] in said
    )  # of the code that made it
    assert {path: path.stat().st_mtime_ns for path in Path("outputs").rglob("*")} == before


def test_it_is_published_with_what_it_has_measured(earlier, call, monkeypatch):
    monkeypatch.setattr("sparse_exp.zoo.samples._ENGINES", ("onnxruntime",))
    manifest = load(earlier / "manifest.json")
    said = call(lambda: zoo.main(sys.argv[1:]), "publish", earlier, "--zoo", "zoo")
    stub = "zoo:cv/detection/yolov5-n/pytorch/sparse_exp/digits/pruned99_quant-none"
    assert said.splitlines()[0] == f"Published {stub}"
    place = Path("zoo") / stub.removeprefix("zoo:")
    metadata = load(place / "model.json")
    stages = manifest["stages"]
    measured = {name: value for stage in stages.values() for name, value in stage["metrics"].items()}
    assert metadata["metrics"] == measured
    assert metadata["sparsity"] == pytest.approx(measured["sparsity/prunable"], abs=1e-6)
    assert (metadata["size"], metadata["quantized"], metadata["imgsz"]) == ("n", True, 96)
    assert metadata["classes"] == stages["fetch"]["facts"]["names"]
    assert metadata["dataset_digest"] == stages["fetch"]["facts"]["dataset"]
    assert metadata["recipe"] == "transfer_quant"
    digests = stages["train"]["outputs"] | stages["export"]["outputs"]
    for copy, own in (
        ("training/model.pt", "weights/best_pruned_quant.pt"),
        ("training/checkpoint_preqat.pt", "weights/best_pruned.pt"),
        ("deployment/model.onnx", "deployment/model.onnx"),
        ("deployment/model.qdq.onnx", "deployment/model.qdq.onnx"),
    ):
        assert sha256_of(place / copy) == digests[own]


@pytest.mark.slow
def test_resume_goes_on_where_it_was_killed(earlier, command_line):
    """In the middle of the training. This version quantizes otherwise, and so plans and trains once more."""
    before = load(earlier / "manifest.json")
    history = load(earlier / "history.json")
    for name in ("weights", "deployment"):
        shutil.rmtree(earlier / name)
    for name in ("history.json", "sparsity.csv", "benchmark.json", "benchmark.csv", "why.json", "report.md"):
        (earlier / name).unlink()
    finished = {stage: before["stages"][stage] for stage in ("fetch", "plan", "baseline")}
    state = {"status": "RUNNING", "stage": "train", "failure": None, "stages": finished}
    (earlier / "manifest.json").write_text(json.dumps({**before, **state}), encoding="utf-8")
    (earlier / LOCK).touch()
    stages = "stages=[fetch,plan,baseline,train]"
    ended = command_line(*before["overrides"], f"resume={earlier}", stages)
    assert ended.code == 0, ended.output
    assert "== fetch: finished before, kept" in ended.output
    assert "== plan: done again" in ended.output
    assert "== train\n" in ended.output
    after = load(earlier / "manifest.json")
    assert after["status"] == "FINISHED"
    assert after["stages"]["fetch"]["facts"] == finished["fetch"]["facts"]
    trained = after["stages"]["train"]
    assert trained["facts"]["promised"] == before["stages"]["train"]["facts"]["promised"]
    assert set(before["stages"]["train"]["outputs"]) <= set(trained["outputs"])
    numbers = ("epoch", "phase", "sparsity/prunable")
    assert [[row[name] for name in numbers] for row in load(earlier / "history.json")] == [
        [row[name] for name in numbers] for row in history
    ]
    assert not (earlier / LOCK).exists()
