"""Making a base and starting from it: dense weights, gradual pruning, the zoo, a transfer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_exp.data import load_dataset
from sparse_exp.data.digits import materialize
from sparse_exp.sources.local import published
from sparse_exp.sparsity.measure import onnx_facts
from sparse_exp.yolov5 import read_checkpoint

COMMON = [
    "model=yolov5n", "tracker=none", "hardware.engines=[onnxruntime]", "hardware.warmup_s=0",
    "hardware.duration_s=0.05", "hardware.repeats=1", "dataset=custom", "dataset.imgsz=64",
    "export.map_atol=1", "dataset.workers=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    materialize(folder / "digits", imgsz=64, train=16, val=6, test=2)
    yaml = materialize(folder / "signs", imgsz=64, train=16, val=6, test=2)
    # The same pictures, called otherwise: one class for even digits, one for odd ones.
    data = load_dataset(yaml)
    for samples in data.splits.values():
        for label in (sample.label for sample in samples):
            rows = [line.split() for line in label.read_text().splitlines()]
            label.write_text("".join(f"{int(c) % 2} {' '.join(xywh)}\n" for c, *xywh in rows))
    text = yaml.read_text().partition("names:")[0]
    yaml.write_text(f"{text}names: [even, odd]\n")
    return folder


def run(place: Path, name: str, *words: str) -> dict:
    environment = {**os.environ, "SPARSE_EXP_CACHE": str(place / "cache")}
    environment.pop("SPARSE_EXP_ZOO", None)
    command = [sys.executable, "-m", "sparse_exp", *COMMON, f"paths.run={name}", *words]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((place / name / "manifest.json").read_text())["stages"]


def zeros_of(path: Path) -> dict[str, object]:
    state = read_checkpoint(path).state_dict
    prunable = {
        k: v for k, v in state.items() if v.ndim == 4 and "model.24." not in k and "model.0." not in k
    }
    return {name.replace(".module", ""): tensor == 0 for name, tensor in prunable.items()}


@pytest.mark.slow
def test_from_dense_weights_over_the_zoo_to_a_sparse_quantized_detector_of_other_classes(place):
    digits, signs = "dataset.path=digits/data.yaml", "dataset.path=signs/data.yaml"
    short = "recipe.variables.num_epochs=2"
    run(place, "dense", digits, "dataset.name=digits", "recipe=dense", short, "model.weights=scratch",
        "stages=[fetch,plan,train,evaluate]")  # fmt: skip

    made = run(
        place, "base", "experiment=sparsify", digits, "dataset.name=digits", short,
        "model.weights=dense/weights/best_dense.pt", "recipe.teacher=self", "recovery.baseline=none",
    )  # fmt: skip
    history = json.loads((place / "base/history.json").read_text())
    assert any("loss/distill" in record for record in history)
    (base,) = published(place / "outputs/zoo")
    assert made["publish"]["metrics"] == {"zoo/stub": base.stub}
    assert base.stub == "zoo:cv/detection/yolov5-n/pytorch/sparse_exp/digits/pruned37-none"
    assert (base.metadata["quantized"], base.metadata["recipe"]) == (False, "prune_distill")

    transfer = run(
        place, "transfer", signs, "dataset.name=signs", "recipe=transfer_quant", short,
        "model.weights=zoo:yolov5-n-digits-pruned37", "publish=auto", "recovery.baseline=none",
    )  # fmt: skip
    plan = transfer["plan"]["facts"]
    assert plan["prune_to"] is None  # the zeros are the base's: no step was inserted
    assert plan["sparsity"] == pytest.approx(base.metadata["sparsity"], abs=1e-4)
    assert "local zoo" in transfer["fetch"]["facts"]["origin"]
    before = zeros_of(base.directory / "training/model.pt")
    for name in ("best_pruned.pt", "best_pruned_quant.pt"):
        after = zeros_of(place / "transfer/weights" / name)
        assert before.keys() == after.keys()
        assert all(bool((after[layer] | ~mask).all()) for layer, mask in before.items())  # every zero held
    assert onnx_facts(place / "transfer/deployment/model.onnx").quantized == 60

    stubs = {model.stub.rsplit("/", 2)[1]: model for model in published(place / "outputs/zoo")}
    assert stubs["signs"].metadata["classes"] == ["even", "odd"]
    assert stubs["signs"].stub.endswith("signs/pruned37_quant-none")
    verify = [sys.executable, "-m", "sparse_exp.zoo", "verify"]
    done = subprocess.run(verify, cwd=place, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("good")) == (0, 2), done.stdout + done.stderr
