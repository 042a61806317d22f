"""Layers in a real engine: no bounds on how fast they are, but on what is measured when."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from sparse_exp.benchmark import layer_times
from sparse_exp.benchmark.layer_times import SPARSITIES, LayerShape, LayerTimes, Table
from sparse_exp.sparsity.prune import blocks

SHAPE = LayerShape(8, 16, (3, 3), 2, 1, 16, 12)
POINT = LayerShape(16, 8, (1, 1), 1, 1, 8, 8)
TABLE = Table("onnxruntime", 1, 1)


def layer_of(shape, sparsity, table):
    network = layer_times._network(shape, sparsity, table)
    onnx.checker.check_model(network)
    weights = [onnx.numpy_helper.to_array(one) for one in network.graph.initializer if "weights" in one.name]
    return network, weights


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("block", [(1, 1), (1, 4), (8, 1)])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_layer_has_its_zeros_in_its_pattern(sparsity, block, quantized):
    _, weights = layer_of(SHAPE, sparsity, replace(TABLE, block=block, quantized=quantized))
    for weight in weights:
        assert weight.shape == (16, 8, 3, 3)
        assert weight.dtype == (np.int8 if quantized else np.float32)
        groups = blocks(torch.from_numpy(weight), block)
        zeros = torch.from_numpy(weight).flatten()[groups] == 0
        assert torch.equal(zeros.any(1), zeros.all(1))  # whole blocks
        assert zeros.all(1).sum() == round(sparsity * len(groups))


def test_the_network_computes_what_torch_computes():
    network, weights = layer_of(SHAPE, 0.5, TABLE)
    features = next(one for one in network.graph.initializer if one.name == "features")
    features = torch.from_numpy(onnx.numpy_helper.to_array(features).copy())
    pixels = np.random.default_rng(1).integers(0, 256, (1, 3, 32, 32), np.uint8)
    session = pytest.importorskip("onnxruntime").InferenceSession(network.SerializeToString())
    (found,) = session.run(None, {"images": pixels})
    maps = [
        torch.nn.functional.conv2d(features + pixels.mean(), torch.from_numpy(weight), stride=2, padding=1)
        for weight in weights
    ]
    assert maps[0].shape[2:] == (8, 6)
    np.testing.assert_allclose(found[0, 0], sum(maps).mean((2, 3))[0], rtol=1e-3, atol=1e-2)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A folder of tables, and the layers that were measured."""
    monkeypatch.setenv("SPARSE_EXP_LOCKS", str(tmp_path))
    monkeypatch.setattr(layer_times, "SPARSITIES", (0.0, 0.9))
    monkeypatch.setattr(layer_times, "_SECONDS", 0.001)
    monkeypatch.setattr(layer_times, "_MAX_WARMUP", 0.0)
    asked, real = [], LayerTimes._measured
    monkeypatch.setattr(
        LayerTimes, "_measured", lambda self, shape: (asked.append(shape), real(self, shape))[1]
    )
    return tmp_path / "layer-times", asked


@pytest.mark.slow
def test_layers_of_one_shape_are_measured_once_and_kept(measured):
    folder, asked = measured
    first = LayerTimes(TABLE, folder).layers([SHAPE, POINT, SHAPE])
    assert asked == [SHAPE, POINT]
    assert all(len(times) == 2 and min(times) >= 0 for times in first.values())
    assert LayerTimes(TABLE, folder).layers([POINT, SHAPE]) == first
    assert asked == [SHAPE, POINT]
    wider = replace(POINT, width=16)
    LayerTimes(TABLE, folder).layers([SHAPE, wider])
    assert asked == [SHAPE, POINT, wider]
    assert [file.suffix for file in folder.iterdir()] == [".json"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["version", "cpu", "batch", "whole"])
def test_times_of_another_engine_host_or_load_are_not_used(measured, monkeypatch, what):
    folder, asked = measured
    LayerTimes(TABLE, folder).layers([POINT])
    (file,) = folder.iterdir()
    table = TABLE
    if what == "version":
        file.write_text(json.dumps({**json.loads(file.read_text()), "version": "0.1"}))
    elif what == "cpu":
        facts = replace(layer_times.host_facts(), cpu="another")
        monkeypatch.setattr(layer_times, "host_facts", lambda: facts)
    elif what == "batch":
        table = replace(TABLE, batch_size=2)
    else:
        file.write_text(file.read_text()[:40])
    LayerTimes(table, folder).layers([POINT])
    assert asked == [POINT, POINT]


@pytest.mark.slow
def test_the_time_of_a_network_is_kept_by_its_kind(measured, monkeypatch):
    folder, _ = measured
    made = []

    def make(file):
        made.append(file)
        onnx.save(layer_times._network(POINT, 0.0, TABLE), str(file))

    images = np.zeros((2, 3, 32, 32), np.uint8)
    time = LayerTimes(TABLE, folder).network("a", make, images)
    assert time > 0
    assert LayerTimes(TABLE, folder).network("a", make, images) == time
    assert len(made) == 1
    LayerTimes(TABLE, folder).network("b", make, images)
    assert len(made) == 2
