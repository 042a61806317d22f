"""The int8 files of a dense network, each in its engine against the network in fp32."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sparse_exp.engines import create_engine
from sparse_exp.engines.openvino import import_openvino
from sparse_exp.export import post_training
from sparse_exp.export.exporter import export_dense_integer
from sparse_exp.export.graph import decoding_nodes
from sparse_exp.export.networks import without_quantizers
from sparse_exp.export.onnx import FileForm, export_float
from sparse_exp.export.post_training import quantize_onnxruntime, quantize_openvino
from sparse_exp.files import full_disk_told
from sparse_exp.runs.metadata import read_metadata
from sparse_exp.sparsity.measure import onnx_facts

IMGSZ, NAMES = 64, tuple("0123456789")
FORM = FileForm(IMGSZ, opset=13, names=NAMES, facts={"run": "x"})


@pytest.fixture(scope="module")
def network(lively_model):
    return without_quantizers(lively_model)


@pytest.fixture(scope="module")
def dense(network, tmp_path_factory):
    file = tmp_path_factory.mktemp("dense") / "dense.onnx"
    export_float(network, file, FORM)
    return file


@pytest.fixture(scope="module")
def reference(network, digit_images) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(digit_images).float() / 255)[0].numpy()


@pytest.fixture(scope="module")
def int8(dense, network, digit_images):
    """Makes the file of an engine, once."""
    made = {}

    def make(engine: str):
        if engine not in made:
            file = dense.with_name(f"{engine}.{'xml' if engine == 'openvino' else 'onnx'}")
            images = [digit_images[:4], digit_images[4:]]
            if engine == "deepsparse":
                export_dense_integer(network, file, images, FORM)
            elif engine == "onnxruntime":
                quantize_onnxruntime(dense, file, images, FORM.entries)
            else:
                quantize_openvino(dense, file, images)
            made[engine] = file
        return made[engine]

    return make


def test_of_a_full_disk_openvino_says_no_more_than_that_a_stream_failed(tmp_path):
    openvino = import_openvino()
    x = openvino.opset13.parameter([1, 300], np.float32)
    weights = openvino.opset13.constant(np.ones((300, 300), np.float32))
    model = openvino.Model([openvino.opset13.matmul(x, weights, False, False)], [x], "a")

    def write(need: int) -> None:
        (tmp_path / "a.bin").symlink_to("/dev/full")
        with full_disk_told(need, tmp_path):
            openvino.serialize(model, str(tmp_path / "a.xml"), str(tmp_path / "a.bin"))

    with pytest.raises(OSError, match="No space left on device"):
        write(shutil.disk_usage(tmp_path).total)
    assert not (tmp_path / "a.bin").exists()  # it removes what it had written
    with pytest.raises(RuntimeError, match="stream"):
        write(0)


# NNCF takes long over the file of OpenVINO.
ENGINES = ["deepsparse", "onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)]


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_computes_its_int8_file_as_the_network_does(engine, int8, reference, digit_images):
    runtime = create_engine(engine)
    runtime.load(int8(engine), batch_size=3, cores=1)
    difference = np.abs(runtime.run(digit_images)[0] - reference)
    runtime.close()
    # Rounded to 8 bits in 60 layers in a row; a wrong scale anywhere gives many times as much.
    assert difference[..., 4:].mean() < 0.02
    assert difference[..., :4].mean() < 1.5
    assert difference[..., 4:].max() > 1e-4  # and it is not the network in fp32


@pytest.mark.parametrize("engine", ENGINES)
def test_classes_and_image_size_go_along(engine, int8):
    found = read_metadata(int8(engine))
    assert found == {
        "names": NAMES, "imgsz": IMGSZ, "stride": 32, "task": "detect", "conf": 0.25, "iou": 0.45, "run": "x",
    }  # fmt: skip


@pytest.mark.slow
def test_the_network_is_left_as_it_was(int8, network, reference, digit_images):
    int8("deepsparse")
    with torch.no_grad():
        again = network(torch.from_numpy(digit_images).float() / 255)[0].numpy()
    np.testing.assert_array_equal(again, reference)


@pytest.mark.slow
def test_all_convolutions_are_integer_in_deepsparses_file(int8):
    facts = onnx_facts(int8("deepsparse"))
    assert facts.quantized == facts.convolutions == 60


def test_onnx_runtime_computes_all_convolutions_but_the_heads_on_integers(int8, tmp_path):
    """What it runs after its own optimization, not what the file says."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(int8("onnxruntime")), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    in_float = [kind for kind in kinds if kind in ("Conv", "FusedConv")]
    assert (kinds.count("QLinearConv"), len(in_float)) == (57, 3)


def test_decoding_is_what_no_convolution_follows(dense):
    graph = onnx.load(str(dense)).graph
    convs = {node.name for node in graph.node if node.op_type == "Conv"}
    decoding = {node.name for node in decoding_nodes(graph)}
    with_head = {node.name for node in decoding_nodes(graph, with_head=True)}
    assert with_head - decoding == {f"/model/model.24/m.{level}/Conv" for level in range(3)}
    assert not decoding & convs
    # By the names of the head's nodes, which the search does not look at.
    assert decoding == {node.name for node in graph.node if "/model.24/" in node.name} - convs


def test_a_quantization_that_fails_leaves_no_file(dense, digit_images, monkeypatch):
    monkeypatch.setattr(post_training, "decoding_nodes", lambda *_, **__: 1 / 0)
    before = set(dense.parent.iterdir())
    with pytest.raises(ZeroDivisionError):
        quantize_openvino(dense, dense.with_name("x.xml"), [digit_images])
    with pytest.raises(ZeroDivisionError):
        quantize_onnxruntime(dense, dense.with_name("x.onnx"), [digit_images], {})
    assert set(dense.parent.iterdir()) == before
