"""Sizes of exported files."""

from __future__ import annotations

import pytest

from sparse_exp.export.accuracy import file_sizes
from sparse_exp.runs.deployment import MODEL, QDQ
from sparse_exp.sparsity.measure import gzip_bytes, nonzero_bytes
from sparse_exp.yolov5 import YOLOv5


def test_sizes_of_a_file(deployment):
    found = file_sizes(deployment / "dense.onnx")
    assert found.onnx_mb == (deployment / "dense.onnx").stat().st_size / 1e6
    assert found.onnx_gzip_mb == gzip_bytes(deployment / "dense.onnx") / 1e6
    # Weights of convolutions alone, in fp32; of initial ones hardly any is 0.
    weights = sum(p.numel() for p in YOLOv5("n", 10).parameters() if p.ndim == 4)
    assert found.nonzero_mb == pytest.approx(4 * weights / 1e6, rel=1e-3)
    # Three quarters are zero and the others are one byte each, in both files of the quantized network.
    integer, pairs = (nonzero_bytes(deployment / name) for name in (MODEL, QDQ))
    assert integer == pairs
    assert 0.15 * weights < integer < 0.3 * weights


def test_sizes_of_openvinos_format_are_those_of_both_files(tmp_path):
    (tmp_path / "m.xml").write_bytes(b"x" * 1000)
    (tmp_path / "m.bin").write_bytes(b"\0" * 300 + b"w" * 200)
    found = file_sizes(tmp_path / "m.xml")
    assert (found.onnx_mb, found.nonzero_mb) == (0.0015, 0.0002)
    assert found.onnx_gzip_mb < 0.0002
