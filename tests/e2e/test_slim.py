"""A network that loses channels, over all stages, the zoo, a transfer to other classes, and the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from test_base import place, run

from sparse_exp.recipes.checkpoints import restore
from sparse_exp.sources.local import published
from sparse_exp.yolov5 import read_checkpoint

__all__ = ["place"]


def command(place: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights_of(path: Path) -> list[int]:
    """The convolutions' numbers of outputs in an ONNX file, small to large."""
    graph = onnx.load(str(path)).graph
    convs = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    return sorted(item.dims[0] for item in graph.initializer if item.name in convs)


@pytest.mark.slow
def test_slim_and_quantized_over_the_zoo_to_other_classes(place):
    digits, signs = "dataset.path=digits/data.yaml", "dataset.path=signs/data.yaml"
    made = run(
        place, "slim", digits, "dataset.name=digits", "recipe=slim_quant", "recipe.variables.num_epochs=4",
        "model.weights=scratch", "publish=auto", "hardware.variants=[dense,dense_int8,sparse_fp32,sparse]",
        "recipe.calibration_images=8", "trainer.batch_size=2",
        "export.box_atol=100",  # boxes of a network that has learned nothing
    )  # fmt: skip
    result = made["evaluate"]["metrics"]
    left = result["size/macs"] / result["size/dense_macs"]
    assert 0.42 < left <= 0.5
    assert made["evaluate"]["facts"]["phase"] == "slim_quant"
    assert "50% from epoch" in made["plan"]["facts"]["lines"]["channels"]
    checkpoint = read_checkpoint(place / "slim/weights/best_slim_quant.pt")
    assert checkpoint.widths == read_checkpoint(place / "slim/weights/best_slim.pt").widths != {}
    float_file = weights_of(place / "slim/deployment/dense.onnx")  # which has all channels
    assert sum(float_file) > 1.2 * sum(checkpoint.widths.values())
    assert made["verify"]["metrics"]["quantized/convolutions"] == 60
    sheet = (place / "slim/report.md").read_text()
    assert f"An image takes {result['size/macs']:.3g} G multiplications ({left:.0%} of the" in sheet

    (model,) = published(place / "outputs/zoo")
    assert model.stub.endswith(f"/digits/slim{round(100 * left)}_quant-none")
    assert "of the work of the stock size is left" in (model.directory / "model.md").read_text()
    assert command(place, "sparse_exp.zoo", "verify").count("good") == 1
    picture = next((place / "digits/images/val").iterdir())
    command(place, "sparse_exp.predict", "slim", str(picture), "--engine", "torch", "--out", "torch")
    command(
        place, "sparse_exp.predict", model.stub, str(picture), "--engine", "onnxruntime", "--out", "found"
    )
    assert (place / "found/predictions.json").is_file()

    transfer = run(
        place, "transfer", signs, "dataset.name=signs", "recipe=transfer_quant", "recipe.channels=0.7",
        "recipe.variables.num_epochs=2", "model.weights=slim/weights/best_slim.pt", "model.sparsity=0.5",
    )  # fmt: skip
    again = transfer["evaluate"]["metrics"]
    assert 0.60 < again["size/macs"] / result["size/macs"] <= 0.701  # the head has other outputs
    assert again["sparsity/prunable"] == pytest.approx(0.5, abs=0.01)
    network, kept = restore(place / "transfer/weights/best_pruned_quant.pt")
    assert kept.names == ("even", "odd")
    assert sum(network.widths.values()) < sum(checkpoint.widths.values())
    assert command(place, "sparse_exp.rerun", "transfer", "--dry-run")

    quantized = [
        *(sys.executable, "-m", "sparse_exp", "model=yolov5n", "dataset=custom", digits, "tracker=none"),
        *("recipe=slim", "model.weights=slim/weights/best_slim_quant.pt", "stages=[fetch,plan]"),
    ]
    refused = subprocess.run(quantized, cwd=place, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "is quantized, and channels are taken out of networks in floating point" in refused.stderr


@pytest.mark.slow
def test_a_run_of_slim_is_the_same_twice(place):
    words = ["dataset.path=digits/data.yaml", "recipe=slim", "recipe.variables.num_epochs=3",
             "model.weights=scratch", "stages=[fetch,plan,train]", "trainer.batch_size=4",
             "recipe.calibration_images=4"]  # fmt: skip
    for name in ("one", "two"):
        run(place, name, *words)
    one, two = (read_checkpoint(place / name / "weights/best_slim.pt") for name in ("one", "two"))
    assert one.widths == two.widths
    assert all(torch.equal(value, two.state_dict[name]) for name, value in one.state_dict.items())
    assert "best_slimming" in json.dumps([p.name for p in (place / "one/weights").iterdir()])
