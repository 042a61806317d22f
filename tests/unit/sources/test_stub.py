from __future__ import annotations

import socket
import sys
import time
import types
from pathlib import Path

import pytest

from sparse_exp.config.schema import SourceConfig
from sparse_exp.errors import ConfigError, SourceUnavailable
from sparse_exp.sources import stub as module
from sparse_exp.sources.cache import cached, fetch
from sparse_exp.sources.recipes import fetch_recipe
from sparse_exp.sources.start import locate
from sparse_exp.sources.stub import parse_stub

V1 = "zoo:cv/detection/yolov5-s/pytorch/ultralytics/coco/pruned75_quant-none"
V2 = "zoo:yolov5-l-coco-pruned90_quantized"


@pytest.mark.parametrize(
    ("text", "architecture", "sub", "dataset", "tag"),
    [
        (V1, "yolov5", "s", "coco", "pruned75_quant-none"),
        ("zoo:cv/detection/yolov5-l/pytorch/ultralytics/coco/base-none", "yolov5", "l", "coco", "base-none"),
        ("zoo:cv/classification/resnet_v1-50/pytorch/sparseml/imagenet-augmented/pruned95-none",
         "resnet_v1", "50", "imagenet", "pruned95-none"),
        ("zoo:cv/detection/ssd/pytorch/repo/coco/base", "ssd", "", "coco", "base"),
        (V2, "yolov5", "l", "coco", "pruned90_quantized"),
        ("zoo:yolov5-s-coco-voc-pruned75", "yolov5", "s", "coco", "pruned75"),
        ("zoo:ssd-coco-base", "ssd", "", "coco", "base"),
    ],
)  # fmt: skip
def test_both_grammars(text, architecture, sub, dataset, tag):
    stub = parse_stub(text)
    assert (stub.architecture, stub.sub, stub.dataset, stub.tag) == (architecture, sub, dataset, tag)
    assert stub.parameters == {}
    assert not stub.names_recipe


def test_every_stub_of_the_models_is_read():
    for size, tag in {
        "n": "pruned40",
        "s": "pruned75",
        "m": "pruned70",
        "l": "pruned90",
        "x": "pruned80",
    }.items():
        file = Path(__file__).parents[3] / "conf" / "model" / f"yolov5{size}.yaml"
        line = next(line for line in file.read_text().splitlines() if line.startswith("stub: "))
        assert parse_stub(line.removeprefix("stub: ")).tag.startswith(tag)


def test_parameters():
    stub = parse_stub(f"{V1}?recipe=transfer_learn&checkpoint=preqat")
    assert stub.parameters == {"recipe": "transfer_learn", "checkpoint": "preqat"}
    assert stub.names_recipe
    assert parse_stub(f"{V2}?recipe_type=original").names_recipe
    assert not parse_stub(f"{V2}?checkpoint=postqat").names_recipe


@pytest.mark.parametrize(
    "text",
    [
        "zoo:", "zoo:foo", "zoo:a-b", "yolov5-s-coco-pruned75",
        "cv/detection/yolov5-s/pytorch/repo/coco/base",
        "zoo:cv/detection/yolov5-s/pytorch/coco/base", "zoo:cv/detection//pytorch/repo/coco/base",
        f"{V1}/more", "zoo:yolov5-s-co co-base", "zoo:../../etc/passwd", "zoo:a-b-c-d-e-f",
    ],
)  # fmt: skip
def test_malformed_stubs_are_refused_in_one_line(text):
    with pytest.raises(ConfigError) as raised:
        parse_stub(text)
    (problem,) = raised.value.problems
    assert problem.startswith("Expected the SparseZoo stub to be zoo:DOMAIN/")
    assert f"but got {text!r}" in problem
    assert "\n" not in problem


@pytest.mark.parametrize("query", ["recipes=x", "recipe", "recipe=", "", "recipe=a&", "a=b&recipe=c"])
def test_unknown_parameters_are_refused(query):
    with pytest.raises(ConfigError, match="of recipe, recipe_type, checkpoint, deployment") as raised:
        parse_stub(f"{V1}?{query}")
    assert "\n" not in str(raised.value)


@pytest.fixture
def client(tmp_path, monkeypatch) -> list[str]:
    """A stand-in for SparseZoo's client that serves a recipe and a checkpoint; returns what was asked."""
    asked: list[str] = []

    class Model:
        def __init__(self, stub: str, download_path: str) -> None:
            asked.append(stub)
            training = Path(download_path) / "training"
            training.mkdir(parents=True)
            (training / "log.txt").write_text("log")
            (training / "model.pt").write_text("final")
            (training / "model.ckpt.pt").write_text("before")
            recipe = Path(download_path) / "recipe_original.md"
            recipe.write_text("---\nmodifiers: []\n---\n")
            self.training = types.SimpleNamespace(default=types.SimpleNamespace(path=str(training)))
            self.recipes = types.SimpleNamespace(default=types.SimpleNamespace(path=str(recipe)))

    monkeypatch.setitem(sys.modules, "sparsezoo", types.SimpleNamespace(Model=Model))
    return asked


def test_recipe_and_checkpoint_are_fetched_once_and_kept_apart(client, tmp_path):
    cache, zoo = tmp_path / "cache", tmp_path / "zoo"
    recipe, weights = fetch_recipe(V1, cache, zoo), locate(V1, cache, zoo).path
    assert recipe.read_text().startswith("---")
    assert recipe.suffix == ".md"
    assert weights.name == "yolov5-s-coco-pruned75_quant-none.pt"
    assert client == [f"{V1}?recipe=original", V1]
    assert (fetch_recipe(V1, cache, zoo), locate(V1, cache, zoo).path) == (recipe, weights)
    assert len(client) == 2  # found in the cache
    assert fetch_recipe(f"{V1}?recipe=transfer_learn", cache, zoo) != recipe
    assert client[-1] == f"{V1}?recipe=transfer_learn"
    assert fetch_recipe(f"{V1}?checkpoint=preqat", cache, zoo)
    assert client[-1] == f"{V1}?checkpoint=preqat&recipe=original"
    assert {path.name for path in (cache / "files").iterdir() if path.name.endswith(".partial")} == set()


@pytest.mark.parametrize(
    ("query", "content"),
    [("", "before"), ("?checkpoint=preqat", "before"), ("?checkpoint=postqat", "final"),
     ("?checkpoint=model.pt", "final")],
)  # fmt: skip
def test_which_checkpoint_is_taken(client, tmp_path, query, content):
    """Of several the one before quantization, unless the stub says otherwise."""
    assert locate(V1 + query, tmp_path / "cache", tmp_path / "zoo").path.read_text() == content
    assert client == [V1 + query]


def test_the_local_zoo_is_asked_first(client, tmp_path):
    model = tmp_path / "zoo" / V1.removeprefix("zoo:")
    (model / "training").mkdir(parents=True)
    (model / "training" / "model.pt").write_text("ours")
    (model / "recipe.md").write_text("our recipe")
    places = tmp_path / "cache", tmp_path / "zoo"
    file = locate(V1, *places)
    assert (file.path, file.downloaded) == (model / "training" / "model.pt", False)
    assert file.origin.startswith(f"local zoo {V1} (sha256 ")
    assert fetch_recipe(V1, *places) == model / "recipe.md"
    assert client == []
    with pytest.raises(SourceUnavailable, match=r"It has model\.pt; choose with \?checkpoint="):
        locate(f"{V1}?checkpoint=other.pt", *places)


def test_a_stub_is_a_source_as_any_other(client, tmp_path):
    source = SourceConfig(uri=V2)
    assert cached(source, tmp_path) is None
    file = fetch(source, tmp_path)
    assert file.origin.startswith(V2)
    assert cached(source, tmp_path).path == file.path


def test_the_stub_of_a_checkpoint_names_no_recipe(client, tmp_path):
    with pytest.raises(ConfigError, match="one that names no recipe"):
        locate(f"{V1}?recipe=original", tmp_path, tmp_path)
    assert client == []


def test_a_service_that_is_gone_says_what_to_do(tmp_path, monkeypatch):
    class Model:
        def __init__(self, *_: object, **__: object) -> None:
            raise ConnectionError("HTTPSConnectionPool(" + "x" * 300 + ")\nand more")

    monkeypatch.setitem(sys.modules, "sparsezoo", types.SimpleNamespace(Model=Model))
    with pytest.raises(SourceUnavailable) as raised:
        fetch_recipe(V1, tmp_path, tmp_path / "zoo")
    message = str(raised.value)
    assert message.startswith(f"SparseZoo does not answer for {V1}?recipe=original (ConnectionError)")
    assert "recipe.file=PATH" in message
    assert "\n" not in message
    assert not [path for path in (tmp_path / "files").rglob("*") if path.is_file()]


def test_a_host_that_never_answers_is_given_up(monkeypatch):
    """The client itself sets no time limit."""
    import requests

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(module, "_TIMEOUT_S", 0.2)
        started = time.monotonic()
        with pytest.raises(requests.exceptions.Timeout), module._short_timeouts():
            requests.get(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert time.monotonic() - started < 10
