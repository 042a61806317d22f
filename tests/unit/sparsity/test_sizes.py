from __future__ import annotations

import pytest
import torch

from sparse_exp.export.onnx import FileForm, export_float
from sparse_exp.sparsity.measure import gzip_bytes, layer_sparsity
from sparse_exp.sparsity.prune import prune_by_magnitude
from sparse_exp.sparsity.sizes import estimate_sizes
from sparse_exp.yolov5 import YOLOv5

IMGSZ = 64


def shares(model: YOLOv5) -> dict[str, float]:
    return {layer.name: layer.sparsity for layer in layer_sparsity(model.prunable_convolutions())}


def test_the_files_of_a_quantized_export(lively_model, deployment, tmp_path):
    estimated = estimate_sizes(YOLOv5("n", 10), shares(lively_model), quantized=True, imgsz=IMGSZ)
    file = deployment / "model.onnx"
    assert estimated.onnx_mb == pytest.approx(file.stat().st_size / 1e6, rel=0.1)
    assert estimated.onnx_gzip_mb == pytest.approx(gzip_bytes(file) / 1e6, rel=0.25)
    torch.save({"state_dict": lively_model.state_dict()}, tmp_path / "q.pt")
    assert estimated.checkpoint_mb == pytest.approx((tmp_path / "q.pt").stat().st_size / 1e6, rel=0.1)


def test_the_files_of_a_float_export(tmp_path):
    torch.manual_seed(0)
    model, file = YOLOv5("n", 3).eval(), tmp_path / "model.onnx"
    prune_by_magnitude(model.prunable_convolutions(), 0.8)
    export_float(model, file, FileForm(IMGSZ, opset=13))
    estimated = estimate_sizes(model, shares(model), quantized=False, imgsz=IMGSZ)
    assert estimated.onnx_mb == pytest.approx(file.stat().st_size / 1e6, rel=0.05)
    assert estimated.onnx_gzip_mb == pytest.approx(gzip_bytes(file) / 1e6, rel=0.25)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "f.pt")
    assert estimated.checkpoint_mb == pytest.approx((tmp_path / "f.pt").stat().st_size / 1e6, rel=0.05)


def test_the_dense_export(deployment):
    estimated = estimate_sizes(YOLOv5("n", 10), {}, quantized=False, imgsz=IMGSZ)
    assert estimated.onnx_mb == pytest.approx((deployment / "dense.onnx").stat().st_size / 1e6, rel=0.05)
    assert estimated.onnx_gzip_mb == pytest.approx(gzip_bytes(deployment / "dense.onnx") / 1e6, rel=0.1)


def test_every_zero_makes_the_compressed_file_smaller():
    model = YOLOv5("n", 1)
    names = list(model.prunable_convolutions())
    sizes = [
        estimate_sizes(model, dict.fromkeys(names, share), quantized=True, imgsz=IMGSZ)
        for share in (0.0, 0.3, 0.5, 0.75, 0.9, 0.99)
    ]
    compressed = [each.onnx_gzip_mb for each in sizes]
    assert compressed == sorted(compressed, reverse=True)
    assert len({each.onnx_mb for each in sizes}) == 1  # a stored zero takes as much as any other value
