"""Which networks a run's files are made of."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from sparse_exp.export.networks import (
    INITIAL,
    Network,
    dense_network,
    sparse_network,
    without_quantizers,
    zeros,
)
from sparse_exp.quantization.quantizers import quantizers
from sparse_exp.recipes.checkpoints import CheckpointWriter
from sparse_exp.runs.directory import Run, StageRecord
from sparse_exp.yolov5 import YOLOv5

CLASSES, IMGSZ = 10, 64


def save(path: Path, model: YOLOv5, phase: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    writer = CheckpointWriter(path.parent, tuple("0123456789"), IMGSZ, "")
    return writer.save(path.name, model, phase, {"epoch": 1.0}, {})


@pytest.fixture
def float_model() -> YOLOv5:
    torch.manual_seed(5)
    return YOLOv5("n", CLASSES).eval()


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path / "run", overwrite=False)


@pytest.fixture
def checkpoint(run, float_model) -> Path:
    """What the run trained: ``float_model``."""
    return save(run.path / "weights" / "best_dense.pt", float_model, "dense")


def with_baseline(run: Run, file: Path) -> Run:
    run.record("baseline", StageRecord("mark", facts={"checkpoint": str(file)}))
    return run


def sparse_of(run: Run, checkpoint: Path, deployed: YOLOv5) -> Network | str:
    return sparse_network(deployed, run.before_quantization(checkpoint))


def same(a: YOLOv5, b: YOLOv5) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def test_without_quantizers_it_computes_as_with_them_switched_off(lively_model, digit_images):
    plain = without_quantizers(lively_model)
    off = copy.deepcopy(lively_model)
    for quantizer in quantizers(off).values():
        quantizer.enabled = False
    images = torch.from_numpy(digit_images).float() / 255
    with torch.no_grad():
        torch.testing.assert_close(plain(images)[0], off(images)[0], atol=1e-3, rtol=1e-4)
        assert (plain(images)[0] - lively_model(images)[0]).abs().max() > 0.01
    assert zeros(plain) == zeros(lively_model) >= 0.75


def test_a_trained_baseline_is_the_dense_network(run, checkpoint, float_model):
    torch.manual_seed(9)
    other = YOLOv5("n", CLASSES).eval()
    file = save(run.path / "elsewhere" / "best_dense.pt", other, "dense")
    found = dense_network(with_baseline(run, file), checkpoint, float_model)
    assert same(found.model, other)
    assert (found.checkpoint, found.trained) == (file, True)


def test_a_dense_run_is_its_own_baseline(run, checkpoint, float_model):
    found = dense_network(run, checkpoint, float_model)
    assert same(found.model, float_model)
    assert found.trained


def test_a_sparse_run_without_a_baseline_has_initial_weights(run, lively_model):
    sparse = without_quantizers(lively_model)
    checkpoint = save(run.path / "weights" / "best_pruned.pt", sparse, "pruned")
    found = dense_network(run, checkpoint, sparse)
    torch.manual_seed(0)
    assert same(found.model, YOLOv5("n", CLASSES))
    assert (found.origin, found.checkpoint, found.trained) == (INITIAL, None, False)


def test_a_baseline_that_is_no_detector_for_these_classes_is_not_used(run, lively_model, caplog):
    sparse = without_quantizers(lively_model)
    checkpoint = save(run.path / "weights" / "best_pruned.pt", sparse, "pruned")
    few = save(run.path / "other" / "best_dense.pt", YOLOv5("n", 3), "dense")
    broken = run.path / "broken.pt"
    broken.write_bytes(b"nothing")
    for file in (few, broken, run.path / "gone.pt"):
        assert not dense_network(with_baseline(run, file), checkpoint, sparse).trained
    assert sum("broken.pt" in record.getMessage() for record in caplog.records) == 1
    assert "gone.pt" not in caplog.text


def test_the_sparse_network_is_that_of_the_last_phase_before_quantization(run, checkpoint, lively_model):
    sparse = without_quantizers(lively_model)
    with torch.no_grad():
        sparse.head.m[0].bias.add_(1.0)
    file = save(run.path / "weights" / "best_pruned.pt", sparse, "pruned")
    found = sparse_of(run, checkpoint, lively_model)
    assert isinstance(found, Network)
    assert same(found.model, sparse)
    assert found.checkpoint == file
    # Of the training's record, and not what lies there by chance.
    run.record("train", StageRecord("mark", {"weights/best_dense.pt": ""}))
    found = sparse_of(run, checkpoint, lively_model)
    assert isinstance(found, Network)
    assert same(found.model, without_quantizers(lively_model))
    assert found.checkpoint is None


def test_a_checkpoint_from_the_zoo_lies_beside_the_final_one(run, lively_model, tmp_path):
    sparse = without_quantizers(lively_model)
    file = save(tmp_path / "weights" / "best_pruned.pt", sparse, "pruned")
    (tmp_path / "training").mkdir()
    shutil.move(file, tmp_path / "training" / "checkpoint_preqat.pt")
    found = sparse_of(run, tmp_path / "training" / "model.pt", lively_model)
    assert isinstance(found, Network)
    assert found.checkpoint == tmp_path / "training" / "checkpoint_preqat.pt"


def test_where_there_is_no_sparse_network_in_fp32_it_says_why(run, checkpoint, float_model, lively_model):
    assert "does not quantize" in sparse_of(run, checkpoint, float_model)
    dense = copy.deepcopy(lively_model)
    with torch.no_grad():
        for conv in dense.prunable_convolutions().values():
            conv.weight.add_(0.01)
    assert "no zeros" in sparse_of(run, checkpoint, dense)
