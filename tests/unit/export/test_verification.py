from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparse_exp.config.schema import ExportConfig, TrainerConfig
from sparse_exp.data.loader import make_loader
from sparse_exp.errors import ExportError, SparsityError
from sparse_exp.export import verification
from sparse_exp.export.first_outputs import FirstOutputs
from sparse_exp.export.verification import (
    Promise,
    check_graph,
    predict,
    standard_error,
    verify_deployment,
    views,
)
from sparse_exp.quantization.reference import as_deployed
from sparse_exp.runs.deployment import Deployment
from sparse_exp.sparsity.measure import LayerSparsity
from sparse_exp.training.evaluation import Validation

CLASSES, IMGSZ = 10, 64


@pytest.fixture
def verified(deployment, digits, lively_model, monkeypatch):
    """Verifies the exported files in an engine; their checkpoint is `lively_model`."""
    monkeypatch.setattr(verification, "restore", lambda _: (lively_model, None))
    loader = make_loader(digits.splits["val"], CLASSES, imgsz=IMGSZ, batch_size=4, train=False)

    def run(engine: str, promised=None, **limits):
        experiment = SimpleNamespace(
            hardware=SimpleNamespace(engines=[engine]),
            trainer=TrainerConfig(val_batch_size=4),
            export=ExportConfig(**limits),
        )
        return verify_deployment(
            Deployment(deployment),
            Path("best.pt"),
            Validation(loader, CLASSES),
            experiment,
            promise=Promise(0.75, promised or {}),
            images=len(digits.splits["val"]),
            layout=torch.contiguous_format,
            device=torch.device("cpu"),
            cores=1,
            first=FirstOutputs(),
        )

    return run


@pytest.fixture
def verify(verified, lively_model, monkeypatch):
    """Verifies with an engine that is torch with something done to its predictions; counts its batches."""
    reference = as_deployed(lively_model)

    def run(change=lambda predictions, _: predictions, **options):
        calls = []

        class Fake:
            def __init__(self, _):
                pass

            def load(self, *_, **__):
                pass

            def run(self, images):
                calls.append(len(images))
                predictions = predict(reference, torch.from_numpy(images))
                return [np.array(change(predictions.numpy(), images))]

            def close(self):
                calls.append("closed")

        monkeypatch.setattr(verification, "IsolatedEngine", Fake)
        return verified("fake", **options)[0], calls

    return run


def test_an_engine_that_computes_the_same_has_no_differences(verify):
    found, calls = verify()
    assert {
        name: found[f"verify/fake/{name}"] for name in ("score_max", "box_max_px", "map50_difference")
    } == {
        "score_max": 0.0,
        "box_max_px": 0.0,
        "map50_difference": 0.0,
    }
    assert found["verify/fake/matched_of_torch"] == found["verify/fake/matched_of_engine"] == 1.0
    assert found["quantized/convolutions"] == 60
    assert found["sparsity/onnx"] >= 0.75
    # The whole split, once in each of four views; the comparison costs no pass of its own.
    assert calls == [4, 2] * 4 + ["closed"]


def test_a_difference_on_the_last_image_alone_is_seen(verify, digit_images):
    def change(predictions, images):
        is_last = (images == digit_images[5]).all(axis=(1, 2, 3))
        return predictions + np.float32(30) * is_last[:, None, None] * np.eye(15, dtype=np.float32)[0]

    found, _ = verify(change, box_atol=100)
    assert found["verify/fake/box_max_px"] == pytest.approx(30, abs=1e-3)
    assert 0 < found["verify/fake/box_mean_px"] < 30 / 4 / 2
    assert found["verify/fake/matched_of_torch"] < 1


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ((1, 1, 1, 1, *[0.7] * 11), "Expected score_mean of fake against torch to be at most 0.05, but got"),
        ((1.2, 1.2, *[1] * 13), "Expected box_mean_px of fake against torch to be at most 1 px, but got"),
    ],
)
def test_differences_past_the_tolerance_fail_before_the_other_passes(verify, scale, message):
    factors = np.float32(scale)
    with pytest.raises(ExportError, match=message):
        verify(lambda predictions, _: predictions * factors)


def test_a_loss_of_map50_fails(monkeypatch):
    check = verification._check_accuracy
    check("fake", -0.0049, 0.0, 0.005)
    check("fake", 0.3, 0.0, 0.005)
    check("fake", -0.008, 0.002, 0.005)  # within two standard errors of the limit
    with pytest.raises(
        ExportError, match=r"mAP50 that fake loses against torch to be at most 0\.005, but got 0\.006"
    ):
        check("fake", -0.006, 0.0, 0.005)
    with pytest.raises(
        ExportError, match=r"at most 0\.005 and 2 standard errors \(0\.0020\), but got 0\.01\. "
    ):
        check("fake", -0.01, 0.002, 0.005)
    with pytest.raises(ExportError):
        check("fake", float("nan"), 0.0, 0.005)


def test_a_small_split_is_looked_at_several_times():
    assert [len(views(images)) for images in (1, 24, 40, 60, 99, 100, 5000)] == [4, 4, 3, 2, 2, 1, 1]
    assert views(24)[0] == 0
    assert len(set(views(24))) == 4


def test_standard_error():
    assert standard_error([0.3]) == 0.0
    assert standard_error([0.0, 0.2]) == pytest.approx(0.1)  # sd 0.1414, of two


def test_a_brighter_view_is_the_same_picture(digits):
    loader = make_loader(digits.splits["val"], CLASSES, imgsz=IMGSZ, batch_size=6, train=False)
    (plain,), (brighter,) = loader, verification._Brighter(loader, 2)
    assert torch.equal(plain.targets, brighter.targets)
    assert torch.equal((plain.images.int() + 2).clamp(max=255), brighter.images.int())


def test_layers_that_lost_zeros_are_named(deployment, lively_model):
    exported = {layer.name: layer for layer in check_graph(deployment / "model.onnx", lively_model)}
    wanted = [
        LayerSparsity(layer.name, layer.zeros + (index in (3, 5)), layer.weights)
        for index, layer in enumerate(exported.values())
    ]
    lost = [wanted[3], wanted[5]]
    with pytest.raises(ExportError) as error:
        verification._check_zeros(deployment / "model.onnx", exported, wanted)
    for layer in lost:
        assert f"{layer.name} ({layer.zeros - 1} of {layer.zeros})" in str(error.value)
    assert wanted[4].name not in str(error.value)


def test_promised_zeros_that_are_missing_in_the_file_fail(verify):
    with pytest.raises(SparsityError, match=r"in model\.onnx, but got less in model\.1\.conv"):
        verify(promised={"model.1.conv": 0.999})


def test_real_engine(verified):
    """Through the file and another process: what the contract tests allow, on the whole split."""
    found, evaluations = verified("onnxruntime")
    assert found["verify/onnxruntime/box_mean_px"] < 1.0
    assert found["verify/onnxruntime/score_mean"] < 0.012
    # Of a network that knows nothing, on six images; outputs are rounded too.
    assert abs(found["verify/onnxruntime/map50_difference"]) < 0.15
    assert len(evaluations["onnxruntime"].recall) == 101
