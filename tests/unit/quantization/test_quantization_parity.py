"""Against records of SparseML 1.8.0 itself; `benchmarks/qat_parity.py` makes them."""

from __future__ import annotations

import io
import logging
import lzma
from pathlib import Path

import pytest
import torch

from sparse_exp.config.schema import LossConfig
from sparse_exp.quantization.quantizers import (
    begin,
    freeze_batch_norms,
    freeze_quantizers,
    is_quantized,
    prepare,
    quantizers,
)
from sparse_exp.quantization.scheme import layer_schemes
from sparse_exp.recipes.checkpoints import restore
from sparse_exp.sources.cache import FetchedFile
from sparse_exp.sources.start import StartFile
from sparse_exp.training.start import load_start
from sparse_exp.yolov5 import DetectionLoss, YOLOv5, read_checkpoint

RECORD = Path(__file__).resolve().parents[2] / "data" / "quantized-by-sparseml.pt.xz"
KINDS = ("0.1", "fork")
IGNORE = ["SiLU", "BatchNorm2d", "MaxPool2d", "Upsample", "Concat"]


@pytest.fixture(scope="module")
def record():
    return torch.load(io.BytesIO(lzma.decompress(RECORD.read_bytes())), weights_only=True)


@pytest.fixture
def file(record, tmp_path):
    """A function that writes one of the recorded checkpoints."""

    def write(kind: str) -> Path:
        torch.save(record[kind], tmp_path / f"{kind}.pt")
        return tmp_path / f"{kind}.pt"

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_sparsemls_predicts_what_it_did_there(record, file, kind):
    model, checkpoint = restore(file(kind))
    assert checkpoint.num_classes == 2
    assert is_quantized(list(model.state_dict()))
    images = record["images"][:1].float() / 255
    with torch.no_grad():
        torch.testing.assert_close(model(images)[0], record["outputs"][kind], rtol=1e-4, atol=1e-3)
        for quantizer in quantizers(model).values():
            quantizer.enabled = False
        assert float((model(images)[0] - record["outputs"][kind]).abs().max()) > 0.05  # rounding matters


@pytest.mark.parametrize("kind", KINDS)
def test_an_ordinary_run_starts_from_quantized_weights_of_any_format(record, file, kind, caplog):
    caplog.set_level(logging.INFO)
    fetched = FetchedFile(file(kind), "", "somewhere", downloaded=False)
    model, start = load_start(StartFile(fetched, "somewhere"), "n", ["a", "b"], seed=0)
    own = model.state_dict()
    assert own.keys() == record["start"].keys()
    convolutions = [name for name, value in own.items() if value.ndim == 4]
    assert len(convolutions) == 60
    assert all(torch.equal(own[name], record["start"][name]) for name in convolutions)
    assert start.quantized
    assert start.sparsity == pytest.approx(0.98, abs=0.01)
    assert not start.left
    assert ["floating point" in message for message in caplog.messages] == [True]


def test_scales_after_some_steps_on_the_digits_are_those_of_sparseml(record):
    model = YOLOv5("n", 2).train()
    model.load_state_dict(record["start"])
    arguments = {"scheme": {"weights": {"num_bits": 8, "symmetric": True}}, "ignore": IGNORE}
    begin(prepare(model, layer_schemes(arguments, model)))
    model.double()
    for quantizer in quantizers(model).values():
        quantizer.float()
    loss_of = DetectionLoss(model.anchors, 2, LossConfig(), 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, targets = record["images"].double() / 255, record["targets"].double()
    for step in range(record["steps"]):
        if step == 3:
            freeze_batch_norms(model)
        if step == 5:
            freeze_quantizers(model)
        optimizer.zero_grad()
        loss_of(model(images), targets)[0].backward()
        optimizer.step()
    own = dict(model.named_modules(remove_duplicate=False))
    assert len(record["scales"]) == 2 * 60 + 2 * 7
    for name, (scale, zero_point) in record["scales"].items():
        quantizer = own[name]
        assert quantizer.scale.item() == pytest.approx(scale.item(), rel=1e-6), name
        assert quantizer.zero_point.item() == zero_point.item(), name


def test_the_fork_format_is_recognized(file):
    checkpoint = read_checkpoint(file("fork"))
    assert checkpoint.format == "sparseml"
    assert checkpoint.names == ("a", "b")
