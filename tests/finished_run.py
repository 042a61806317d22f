"""A finished run on disk without the training: what publishing reads of one, and the model that it gives."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from sparse_exp.config.places import register_schema
from sparse_exp.config.plain import CONF_DIRECTORY, as_yaml
from sparse_exp.files import sha256_of
from sparse_exp.resolve import resolve
from sparse_exp.runs.directory import StageRecord
from sparse_exp.sparsity.measure import layer_sparsity, onnx_facts, overall
from sparse_exp.sparsity.prune import prune_by_magnitude
from sparse_exp.yolov5 import YOLOv5, save_checkpoint

IMGSZ = 64
STUB = "zoo:cv/detection/yolov5-n/pytorch/sparse_exp/digits/pruned75_quant-none"


def save(path: Path, model: YOLOv5, names: tuple[str, ...], *, phase: str, recipe: str = "") -> Path:
    """Write a checkpoint of our format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        path, model_state=model.state_dict(), size="n", num_classes=len(names), names=names, imgsz=IMGSZ,
        recipe=recipe, phase=phase, epoch=3.0, metrics={"val/map50": 0.5},
    )  # fmt: skip
    return path


def pruned(names: tuple[str, ...], share: float = 0.75, seed: int = 0) -> YOLOv5:
    """A random yolov5n with zeros."""
    torch.manual_seed(seed)
    model = YOLOv5("n", len(names))
    prune_by_magnitude(model.prunable_convolutions(), share)
    return model


@pytest.fixture(scope="session")
def finished_run(lively_model, deployment, digits, tmp_path_factory) -> Path:
    """The directory of a run that pruned, quantized, exported and verified; do not change it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    before = save(run / "weights/best_pruned.pt", pruned(digits.names), digits.names, phase="pruned")
    last = run / "weights/best_pruned_quant.pt"
    save(last, lively_model, digits.names, phase="pruned_quant", recipe="modifiers: []")
    shutil.copytree(deployment, run / "deployment")
    (run / "recipe.md").write_text("---\nmodifiers: []\n---\n", encoding="utf-8")
    (run / "config.yaml").write_text(_config(digits), encoding="utf-8")
    exported = sorted((run / "deployment").glob("*.onnx"))
    layers = layer_sparsity(lively_model.prunable_convolutions())
    metrics = {"val/map50": 0.5, "sparsity/prunable": overall(layers), "size/onnx_gzip_mb": 1.5}
    stages = {
        "fetch": StageRecord("1", facts={"origin": "scratch", "dataset": digits.digest}),
        "train": StageRecord(
            "2", _digests(run, [before, last]), facts={"checkpoint": f"weights/{last.name}"}
        ),
        "evaluate": StageRecord("3", metrics=metrics),
        "export": StageRecord("4", _digests(run, exported), facts={"imgsz": IMGSZ}),
        "verify": StageRecord("5", metrics={"sparsity/onnx": _zeros(run / "deployment/model.onnx")}),
    }
    records = {name: asdict(record) for name, record in stages.items()}
    manifest = {"status": "FINISHED", "tracker_run_id": "abc", "stages": records}
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return run


def _config(digits) -> str:
    register_schema()
    with initialize_config_dir(str(CONF_DIRECTORY), version_base="1.3"):
        composed = compose("config", ["model=yolov5n", "model.weights=scratch", "dataset=custom",
                                      "dataset.name=digits", f"dataset.imgsz={IMGSZ}", "paths.run=run",
                                      f"dataset.path='{digits.root / 'data.yaml'}'"])  # fmt: skip
    return as_yaml(resolve(composed))


def _digests(run: Path, files: list[Path]) -> dict[str, str]:
    return {str(path.relative_to(run)): sha256_of(path) for path in files}


def _zeros(path: Path) -> float:
    """Share of zeros of all convolutions but the stem's and the head's."""
    layers = [x for x in onnx_facts(path).layers if "/model.0/" not in x.name and "/model.24/" not in x.name]
    return sum(layer.zeros for layer in layers) / sum(layer.weights for layer in layers)


@pytest.fixture(scope="session")
def published_model(finished_run, digits, tmp_path_factory):
    """That run in a local zoo; do not change it. Its directory is ``.directory``."""
    from sparse_exp.zoo.publish import publish_run, read_finished

    return publish_run(read_finished(finished_run), tmp_path_factory.mktemp("zoo"), dataset=digits)
