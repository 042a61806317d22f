from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_exp.errors import ConfigError, SourceUnavailable
from sparse_exp.sources.layout import checkpoint_in, recipe_in
from sparse_exp.sources.local import (
    default_stub,
    directory_of,
    find,
    published,
    short_name,
    sparse_tag,
    zoo_directory,
)

OURS = "cv/detection/yolov5-s/pytorch/sparse_exp/trees/pruned75_quant-none"
THEIRS = "cv/detection/yolov5-s/pytorch/ultralytics/coco/pruned75_quant-none"


SAYS = {
    "format": "sparse_exp.zoo/1", "short": "", "size": "s", "dataset": "trees", "tag": "", "recipe": "",
    "published": "", "by": "me", "classes": ["a"], "sparsity": 0.75, "quantized": True, "block4": False,
    "metrics": {}, "samples": {},
}  # fmt: skip


def model(zoo: Path, path: str, **metadata) -> Path:
    directory = zoo / path
    directory.mkdir(parents=True)
    content = {**SAYS, "stub": f"zoo:{path}", **metadata}
    (directory / "model.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture
def zoo(tmp_path) -> Path:
    model(tmp_path, OURS)
    model(tmp_path, THEIRS)
    return tmp_path


def test_where_the_zoo_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSE_EXP_ZOO", raising=False)
    assert zoo_directory() == tmp_path / "outputs/zoo"
    monkeypatch.setenv("SPARSE_EXP_ZOO", "/team/zoo")
    assert zoo_directory() == Path("/team/zoo")
    assert zoo_directory("mine") == tmp_path / "mine"
    assert zoo_directory("~/mine") == Path.home() / "mine"


@pytest.mark.parametrize(
    "stub",
    [
        f"zoo:{OURS}",
        f"zoo:{OURS}?checkpoint=preqat",
        "zoo:yolov5-s-trees-pruned75_quant",
        "zoo:yolov5-s-coco-trees-pruned75_quant",  # from COCO, trained on trees
    ],
)
def test_a_model_is_found_by_either_grammar(zoo, stub):
    assert find(stub, zoo) == zoo / OURS


@pytest.mark.parametrize(
    "stub",
    [
        f"zoo:{OURS}-vnni",
        "zoo:yolov5-n-trees-pruned75_quant",
        "zoo:yolov5-s-trees-pruned75",
        "zoo:yolov5-s-trees-coco-base",
    ],
)
def test_what_is_not_there_is_not_found(zoo, stub):
    assert find(stub, zoo) is None
    assert find(stub, zoo / "nowhere") is None


def test_a_stub_that_means_two_models_is_refused(zoo):
    other = model(zoo, THEIRS.replace("ultralytics", "sparse_exp"))
    with pytest.raises(ConfigError) as raised:
        find("zoo:yolov5-s-coco-pruned75_quant", zoo)
    assert "ultralytics" in str(raised.value)
    assert str(other.relative_to(zoo)) in str(raised.value)


def test_a_directory_of_sparsezoo_needs_no_metadata(tmp_path):
    (tmp_path / THEIRS / "training").mkdir(parents=True)
    assert find(f"zoo:{THEIRS}", tmp_path) == tmp_path / THEIRS
    assert published(tmp_path) == []  # but only what says what it is can be listed


def test_what_is_hidden_or_damaged_is_not_listed(zoo):
    model(zoo, OURS.replace("trees", ".trees"))
    (zoo / ".publishing/cv").mkdir(parents=True)
    model(zoo, OURS.replace("trees", "elms")).joinpath("model.json").write_text("{", encoding="utf-8")
    model(zoo, OURS.replace("trees", "oaks"), format="another/2")
    assert [entry.stub for entry in published(zoo)] == [f"zoo:{OURS}", f"zoo:{THEIRS}"]


@pytest.mark.parametrize(
    ("arguments", "tag"),
    [
        ((0.7504, True), "pruned75_quant-none"),
        ((0.6963, False), "pruned70-none"),
        ((0.0, False), "base-none"),
        ((0.004, True), "base_quant-none"),
        ((0.35, True, True), "pruned35_quant-none-vnni"),  # as SparseZoo calls its own
        ((0.0, False, True), "base-none"),
    ],
)
def test_tags(arguments, tag):
    sparsity, quantized, *block4 = arguments
    assert sparse_tag(sparsity, quantized=quantized, block4=bool(block4)) == tag


@pytest.mark.parametrize(
    ("dataset", "part"),
    [("trees", "trees"), ("my trees-2", "my_trees_2"), ("Bäume", "B_ume"), ("木", "custom"), ("../x", "x")],
)
def test_default_stubs_are_stubs_whatever_the_data_set_is_called(dataset, part, tmp_path):
    stub = default_stub("s", dataset, "base-none")
    assert stub == f"zoo:cv/detection/yolov5-s/pytorch/sparse_exp/{part}/base-none"
    assert directory_of(stub, tmp_path).is_relative_to(tmp_path)


@pytest.mark.parametrize("tag", ["pruned75_quant-none", "base-none", "pruned35_quant-none-vnni", "mine-2"])
def test_the_short_name_of_a_model_leads_to_it(tmp_path, tag):
    path = f"cv/detection/yolov5-s/pytorch/sparse_exp/trees/{tag}"
    model(tmp_path, path)
    assert find(short_name(f"zoo:{path}"), tmp_path) == tmp_path / path


def test_a_short_stub_to_publish_under_becomes_a_long_one(tmp_path):
    expected = tmp_path / "cv/detection/yolov5-s/pytorch/sparse_exp/trees/pruned75-none"
    assert directory_of("zoo:yolov5-s-trees-pruned75", tmp_path) == expected
    assert directory_of("zoo:yolov5-s-coco-trees-pruned75", tmp_path) == expected


@pytest.mark.parametrize(
    "stub",
    [
        "zoo:cv/../yolov5-s/pytorch/sparse_exp/trees/base-none",
        "zoo:cv/detection/yolov5-s/pytorch/.hidden/trees/base-none",
        f"zoo:{OURS}?checkpoint=preqat",
        "zoo:mine",
        "cv/detection/yolov5-s/pytorch/sparse_exp/trees/base-none",
        "zoo:cv/detection/yolov5-s/pytorch/sparse_exp/my trees/base-none",
    ],
)
def test_no_model_lies_outside_the_zoo_or_hidden_in_it(tmp_path, stub):
    with pytest.raises(ConfigError) as raised:
        directory_of(stub, tmp_path)
    assert "\n" not in str(raised.value)


def layout(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("names", "which", "chosen"),
    [
        (["training/model.pt"], None, "model.pt"),
        (["training/model.pt"], "preqat", "model.pt"),  # never quantized: it is what it was
        (["training/model.pt", "training/checkpoint_preqat.pt"], None, "checkpoint_preqat.pt"),
        (["training/model.pt", "training/checkpoint_preqat.pt"], "postqat", "model.pt"),
        (["training/model.pt", "training/model.ckpt.pt"], None, "model.ckpt.pt"),  # SparseZoo's own
        (["training/model.pt", "training/model.ckpt.pt"], "postqat", "model.pt"),
        (["training/model.pt", "training/last.pt"], "last.pt", "last.pt"),
        (["training/last.pth", "training/model.pt"], None, "model.pt"),
        (["training/PreQAT_weights.pt", "training/model.pt"], None, "PreQAT_weights.pt"),
        (["model.safetensors", "model.onnx"], None, "model.safetensors"),
    ],
)
def test_which_checkpoint(tmp_path, names, which, chosen):
    assert checkpoint_in(layout(tmp_path, *names), which).name == chosen


def test_a_directory_without_the_checkpoint_says_what_it_has(tmp_path):
    with pytest.raises(SourceUnavailable, match="a checkpoint"):
        checkpoint_in(tmp_path / "nowhere")
    layout(tmp_path, "training/model.pt", "deployment/model.onnx")
    with pytest.raises(SourceUnavailable) as raised:
        checkpoint_in(tmp_path, "best.pt")
    assert "It has model.pt" in str(raised.value)


def test_which_recipe(tmp_path):
    with pytest.raises(SourceUnavailable):
        recipe_in(tmp_path)
    layout(tmp_path, "recipe.md", "recipe_transfer.md")
    assert recipe_in(tmp_path).name == "recipe.md"
    assert recipe_in(tmp_path, "transfer").name == "recipe_transfer.md"
    assert recipe_in(layout(tmp_path, "recipe_original.md"), "original").name == "recipe_original.md"
    with pytest.raises(SourceUnavailable, match=r"recipe\.md, recipe_original\.md, recipe_transfer\.md"):
        recipe_in(tmp_path, "another")
