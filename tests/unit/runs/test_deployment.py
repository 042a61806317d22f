"""Which file of a deployment directory an engine runs, and what the directory says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_exp.config.schema import ENGINES, VARIANTS
from sparse_exp.errors import Impossible
from sparse_exp.runs.deployment import MODEL, ONNXRUNTIME, QDQ, TORCH, Deployment, wanted_files
from sparse_exp.runs.directory import Run, StageRecord

ALL = list(VARIANTS)


def filled(folder: Path, *names: str, **more) -> Deployment:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return Deployment(folder, **more)


def test_only_what_is_asked_for_is_made():
    assert wanted_files(["deepsparse", "openvino"], ["dense", "sparse"]) == []
    assert wanted_files(["deepsparse", "openvino"], ["dense_int8"]) == [
        "dense.int8.deepsparse.onnx",
        "dense.int8.openvino.xml",
    ]
    assert wanted_files(["torch", "onnxruntime"], ALL) == [
        "dense.int8.onnxruntime.onnx",
        "dense.pt",
        "sparse.fp32.onnx",
        "sparse.fp32.pt",
    ]


@pytest.mark.parametrize(
    ("there", "deepsparse", "onnxruntime", "openvino"),
    [
        ([MODEL, QDQ, ONNXRUNTIME], MODEL, ONNXRUNTIME, QDQ),  # each takes the graph that it runs fast
        ([MODEL, QDQ], MODEL, QDQ, QDQ),  # of versions before 0.2, or without images to find ranges with
        ([MODEL], MODEL, MODEL, MODEL),  # a network that was not quantized
        ([QDQ], QDQ, QDQ, QDQ),  # each takes what there is
        ([], MODEL, MODEL, MODEL),  # which a message can name
    ],
)
def test_each_engine_gets_the_graph_that_it_runs_fast(tmp_path, there, deepsparse, onnxruntime, openvino):
    deployment = filled(tmp_path / "deployment", *there, checkpoint=tmp_path / "best.pt")
    wanted = {"deepsparse": deepsparse, "onnxruntime": onnxruntime, "openvino": openvino}
    wanted |= {"mnn": openvino, TORCH: "best.pt"}
    assert {engine: deployment.deployed(engine).name for engine in ENGINES} == wanted
    assert deployment.quantized == (QDQ in there)
    assert [path.name for path in deployment.deployed_files] == there


def test_torch_runs_checkpoints_and_no_int8(tmp_path):
    run = Run.create(tmp_path / "run", overwrite=False)
    run.record("train", StageRecord("mark", facts={"checkpoint": "weights/best_pruned.pt"}))
    (run.path / "weights").mkdir()
    (run.path / "weights" / "best_pruned.pt").touch()
    (run.path / "deployment").mkdir()
    (run.path / "deployment" / "dense.pt").touch()
    assert run.deployment.file("torch", "dense").name == "dense.pt"
    assert run.deployment.file("torch", "sparse") == run.checkpoint  # of a run that does not quantize
    (run.path / "deployment" / QDQ).touch()
    for variant in ("sparse", "dense_int8"):
        with pytest.raises(Impossible, match="torch has no int8 convolutions"):
            run.deployment.file("torch", variant)
        with pytest.raises(Impossible, match=r"mnn runs no quantized ONNX file: .* recipe=transfer"):
            run.deployment.file("mnn", variant)


def test_a_file_of_each_variant_and_why_there_is_none(tmp_path):
    names = ["dense.onnx", "dense.int8.openvino.xml", "sparse.fp32.onnx", MODEL, QDQ]
    reasons = {"dense.int8.onnxruntime.onnx": "It cannot.", "sparse.fp32.onnx": "Nor this."}
    deployment = filled(tmp_path / "deployment", *names, impossible=reasons)
    found = [deployment.file("openvino", variant).name for variant in ("dense", "dense_int8", "sparse")]
    assert found == ["dense.onnx", "dense.int8.openvino.xml", QDQ]
    for engine, variant, reason in (
        ("onnxruntime", "dense_int8", r"^It cannot\.$"),
        ("openvino", "sparse_fp32", r"^Nor this\.$"),  # a file of an earlier export does not count
        (
            "deepsparse",
            "dense_int8",
            r"^Expected dense\.int8\.deepsparse\.onnx to be in deployment, but got ",
        ),
        ("deepsparse", "dense_int8", "Run the export stage with dense_int8 in hardware.variants and deepsp"),
    ):
        with pytest.raises(Impossible, match=reason):
            deployment.file(engine, variant)


def test_only_dense_networks_can_have_weights_that_mean_nothing(tmp_path):
    for trained in (True, False):
        deployment = Deployment(tmp_path, dense_is_trained=trained)
        assert [deployment.is_trained(variant) for variant in ("dense", "dense_int8")] == [trained] * 2
        assert [deployment.is_trained(variant) for variant in ("sparse", "sparse_fp32")] == [True] * 2


def test_what_a_run_has_exported(tmp_path):
    run = Run.create(tmp_path / "run", overwrite=False)
    assert run.deployment == Deployment(run.path / "deployment")
    run.record("train", StageRecord("mark", facts={"checkpoint": "weights/best_pruned.pt"}))
    facts = {"dense": {"trained": True}, "impossible": {"dense.pt": "why"}}
    run.record("export", StageRecord("mark", facts=facts))
    checkpoint = run.path / "weights" / "best_pruned.pt"
    assert run.deployment == Deployment(
        run.path / "deployment", checkpoint, {"dense.pt": "why"}, dense_is_trained=True
    )


def test_graphs_are_counted_without_openvinos_weights_and_checkpoints(tmp_path):
    made = ["model.onnx", "dense.int8.openvino.xml", "dense.int8.openvino.bin", "dense.pt"]
    deployment = filled(tmp_path, *made, "class_names.json")
    assert [path.name for path in deployment.files] == ["dense.int8.openvino.xml", "model.onnx"]


def test_clearing_leaves_what_no_export_has_made(tmp_path):
    made = ["model.onnx", "model.qdq.onnx", "model.onnxruntime.onnx", "dense.onnx",
            "dense.pt", "dense.int8.openvino.xml",
            "dense.int8.openvino.bin", "sparse.fp32.onnx", "sparse.fp32.pt"]  # fmt: skip
    deployment = filled(tmp_path / "deployment", *made, "notes.txt", "class_names.json")
    deployment.clear()
    assert {path.name for path in deployment.folder.iterdir()} == {"notes.txt", "class_names.json"}
    Deployment(tmp_path / "nowhere").clear()


@pytest.mark.parametrize(
    ("text", "names"), [(None, ()), ("{", ()), ('{"0": "a"}', ()), ('["person", 7]', ("person", "7"))]
)
def test_the_names_of_the_classes_that_lie_beside_a_model(tmp_path, text, names):
    if text is not None:
        (tmp_path / "class_names.json").write_text(text)
    assert Deployment(tmp_path).names == names
