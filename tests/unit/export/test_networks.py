"""Which networks a run's files are made of."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

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
from sparse_exp.runs.deployment import before_quantization
from sparse_exp.sparsity.checkpoints import CheckpointWriter
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
def context(tmp_path, float_model):
    """A run that trained ``float_model``; its baseline is ``facts["baseline"]``."""
    facts: dict = {"baseline": {}}
    return SimpleNamespace(
        run=SimpleNamespace(path=tmp_path, records={}),
        checkpoint=save(tmp_path / "weights" / "best_dense.pt", float_model, "dense"),
        facts=lambda stage: facts.get(stage, {}),
        all_facts=facts,
    )


def sparse_of(context, deployed: YOLOv5) -> Network | str:
    return sparse_network(deployed, before_quantization(context.checkpoint, context.run.records))


def same(a: YOLOv5, b: YOLOv5) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def test_without_quantizers_it_computes_as_with_them_switched_off(lively_model, digit_images):
    plain = without_quantizers(lively_model)
    off = copy.deepcopy(lively_model).apply(torch.ao.quantization.disable_fake_quant)
    images = torch.from_numpy(digit_images).float() / 255
    with torch.no_grad():
        torch.testing.assert_close(plain(images)[0], off(images)[0], atol=1e-3, rtol=1e-4)
        assert (plain(images)[0] - lively_model(images)[0]).abs().max() > 0.01
    assert zeros(plain) == zeros(lively_model) >= 0.75


def test_a_trained_baseline_is_the_dense_network(context, float_model):
    torch.manual_seed(9)
    other = YOLOv5("n", CLASSES).eval()
    file = save(context.run.path / "elsewhere" / "best_dense.pt", other, "dense")
    context.all_facts["baseline"] = {"checkpoint": str(file)}
    found = dense_network(context, float_model)
    assert same(found.model, other)
    assert (found.checkpoint, found.trained) == (file, True)


def test_a_dense_run_is_its_own_baseline(context, float_model):
    found = dense_network(context, float_model)
    assert same(found.model, float_model)
    assert found.trained


def test_a_sparse_run_without_a_baseline_has_initial_weights(context, float_model, lively_model):
    sparse = without_quantizers(lively_model)
    context.checkpoint = save(context.run.path / "weights" / "best_pruned.pt", sparse, "pruned")
    found = dense_network(context, sparse)
    torch.manual_seed(0)
    assert same(found.model, YOLOv5("n", CLASSES))
    assert (found.origin, found.checkpoint, found.trained) == (INITIAL, None, False)


def test_a_baseline_that_is_no_detector_for_these_classes_is_not_used(context, lively_model, caplog):
    sparse = without_quantizers(lively_model)
    context.checkpoint = save(context.run.path / "weights" / "best_pruned.pt", sparse, "pruned")
    few = save(context.run.path / "other" / "best_dense.pt", YOLOv5("n", 3), "dense")
    broken = context.run.path / "broken.pt"
    broken.write_bytes(b"nothing")
    for file in (few, broken, context.run.path / "gone.pt"):
        context.all_facts["baseline"] = {"checkpoint": str(file)}
        assert not dense_network(context, sparse).trained
    assert ["broken.pt" in record.getMessage() for record in caplog.records] == [True]


def test_the_sparse_network_is_that_of_the_last_phase_before_quantization(context, lively_model):
    sparse = without_quantizers(lively_model)
    with torch.no_grad():
        sparse.head.m[0].bias.add_(1.0)
    file = save(context.run.path / "weights" / "best_pruned.pt", sparse, "pruned")
    found = sparse_of(context, lively_model)
    assert isinstance(found, Network)
    assert same(found.model, sparse)
    assert found.checkpoint == file
    # Of the training's record, and not what lies there by chance.
    context.run.records["train"] = SimpleNamespace(outputs={"weights/best_dense.pt": ""})
    found = sparse_of(context, lively_model)
    assert isinstance(found, Network)
    assert same(found.model, without_quantizers(lively_model))
    assert found.checkpoint is None


def test_a_checkpoint_from_the_zoo_lies_beside_the_final_one(context, lively_model, tmp_path):
    sparse = without_quantizers(lively_model)
    file = save(tmp_path / "weights" / "best_pruned.pt", sparse, "pruned")
    (tmp_path / "training").mkdir()
    shutil.move(file, tmp_path / "training" / "checkpoint_preqat.pt")
    context.checkpoint = tmp_path / "training" / "model.pt"
    found = sparse_of(context, lively_model)
    assert isinstance(found, Network)
    assert found.checkpoint == tmp_path / "training" / "checkpoint_preqat.pt"


def test_where_there_is_no_sparse_network_in_fp32_it_says_why(context, float_model, lively_model):
    assert "does not quantize" in sparse_of(context, float_model)
    dense = copy.deepcopy(lively_model)
    with torch.no_grad():
        for conv in dense.prunable_convolutions().values():
            conv.weight.add_(0.01)
    assert "no zeros" in sparse_of(context, dense)
