from __future__ import annotations

import io
import re
import socket
import tarfile
import time
from pathlib import Path

import pytest
from webserver import CONTENT

from sparse_exp.config.schema import SourceConfig
from sparse_exp.errors import ConfigError, SourceUnavailable
from sparse_exp.sources import download as downloads
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


FILES = {
    "model.onnx": ("onnx", b"graph"),
    "log.txt": ("framework", b"log"),
    "model.pt": ("framework", b"final"),
    "model.ckpt.pt": ("framework", b"before"),
    "recipe_original.md": ("recipe", b"---\nmodifiers: []\n---\n"),
    "recipe_transfer_learn.md": ("recipe", b"---\nmodifiers: [1]\n---\n"),
}


class Service:
    """Answers as SparseZoo's service did; its own client takes it for that, too."""

    def __init__(self, server) -> None:
        self.server, self.queries = server, []
        self.serve(FILES)

    def serve(self, files: dict[str, tuple[str, bytes]]) -> None:
        listing = [
            {"displayName": name, "downloadUrl": f"{self.server.url}/files/{name}", "fileType": kind,
             "fileSize": len(content), "modelId": "1"}
            for name, (kind, content) in files.items()
        ]  # fmt: skip
        self.server.files = {f"/files/{name}": content for name, (_, content) in files.items()}
        model = {
            "modelId": "1", "files": listing, "benchmarkResults": [], "trainingResults": [],
            "repoName": "r", "repoNamespace": "n", "modelOnnxSizeCompressedBytes": 1,
        }  # fmt: skip
        self.answer({"data": {"models": [model]}})

    def answer(self, answer: object) -> None:
        def respond(asked: dict) -> object:
            self.queries.append(" ".join(asked["query"].split()))
            return answer

        self.server.posts["/v2/graphql"] = respond

    @property
    def fetched(self) -> list[str]:
        return [path.removeprefix("/files/") for path in self.server.requests if path != "/v2/graphql"]


@pytest.fixture
def service(server, monkeypatch) -> Service:
    """A service that has one model, whatever is asked for."""
    monkeypatch.setenv("SPARSEZOO_API_URL", server.url)
    return Service(server)


@pytest.mark.parametrize(
    ("stub", "arguments"),
    [
        (V1, {"domain": "cv", "task": "detection", "architecture": "yolov5", "subArchitecture": "s",
              "framework": "pytorch", "repo": "ultralytics", "sourceDataset": "coco",
              "sparseTag": "pruned75_quant-none"}),
        ("zoo:cv/detection/ssd/pytorch/repo/coco-augmented/base",
         {"domain": "cv", "task": "detection", "architecture": "ssd", "framework": "pytorch", "repo": "repo",
          "sourceDataset": "coco", "sparseTag": "base"}),
        (V2, {"repoName": "yolov5-l-coco-pruned90_quantized"}),
    ],
)  # fmt: skip
def test_the_service_is_asked_as_by_its_own_client(service, stub, arguments, tmp_path, monkeypatch):
    """By hand from the client's source; where it is installed, by the client itself."""
    assert locate(f"{stub}?checkpoint=postqat", tmp_path / "cache", tmp_path / "zoo")
    (query,) = service.queries
    inside = re.fullmatch(r"{ models\((.*)\) { files\(version: 2\) { .* } } }", query)
    assert dict(re.findall(r'(\w+): "([^"]*)"', inside[1])) == arguments
    graphql = pytest.importorskip("sparsezoo.api.graphql", reason="SparseZoo's client is not installed")
    monkeypatch.setattr(graphql, "BASE_API_URL", service.server.url)
    monkeypatch.setenv("HOME", str(tmp_path))
    from sparsezoo import Model

    model = Model(stub, download_path=str(tmp_path / "client"))
    assert {file.name for file in model.training.default.files} == {"log.txt", "model.pt", "model.ckpt.pt"}
    theirs = re.search(r"models \((.*?)\)", service.queries[-1])
    assert dict(re.findall(r'(\w+): "([^"]*)"', theirs[1])) == arguments


def test_recipe_and_checkpoint_are_fetched_once_and_kept_apart(service, tmp_path):
    cache, zoo = tmp_path / "cache", tmp_path / "zoo"
    recipe, weights = fetch_recipe(V1, cache, zoo), locate(V1, cache, zoo).path
    assert recipe.read_text().startswith("---")
    assert recipe.suffix == ".md"
    assert weights.name == "yolov5-s-coco-pruned75_quant-none.pt"
    assert service.fetched == ["recipe_original.md", "model.ckpt.pt"]
    assert (fetch_recipe(V1, cache, zoo), locate(V1, cache, zoo).path) == (recipe, weights)
    assert len(service.queries) == 2  # found in the cache
    assert fetch_recipe(f"{V1}?recipe=transfer_learn", cache, zoo) != recipe
    assert fetch_recipe(f"{V1}?recipe_type=transfer_learn", cache, zoo)
    assert service.fetched[2:] == ["recipe_transfer_learn.md"] * 2
    assert fetch_recipe(f"{V1}?checkpoint=preqat", cache, zoo).read_bytes() == recipe.read_bytes()
    assert {path.suffix for path in (cache / "files").iterdir()} == {""}  # nothing unfinished


@pytest.mark.parametrize(
    ("query", "content"),
    [("", "before"), ("?checkpoint=preqat", "before"), ("?checkpoint=postqat", "final"),
     ("?checkpoint=model.pt", "final")],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_which_checkpoint_is_taken(service, tmp_path, query, content, packed):
    """Of several the one before quantization, unless the stub says otherwise."""
    if packed:
        service.serve({"training.tar.gz": ("training", archive(FILES, tmp_path))})
    assert locate(V1 + query, tmp_path / "cache", tmp_path / "zoo").path.read_text() == content


def archive(files: dict[str, tuple[str, bytes]], folder: Path) -> bytes:
    """The training files as an archive."""
    path = folder / "training.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, (kind, content) in files.items():
            if kind == "framework":
                member = tarfile.TarInfo(f"training/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def test_a_damaged_archive_is_refused(service, tmp_path):
    service.serve({"training.tar.gz": ("training", b"no archive")})
    with pytest.raises(SourceUnavailable, match="no whole archive"):
        locate(V1, tmp_path / "cache", tmp_path / "zoo")


def test_a_download_that_stopped_goes_on(service, tmp_path):
    service.serve({"model.pt": ("framework", CONTENT)})
    service.server.hangs_up = True
    with pytest.raises(SourceUnavailable, match="stopped after"):
        locate(V1, tmp_path / "cache", tmp_path / "zoo")
    service.server.hangs_up = False
    assert locate(V1, tmp_path / "cache", tmp_path / "zoo").path.read_bytes() == CONTENT
    assert service.server.ranges[-1] == f"bytes={len(CONTENT) // 2}-"


def test_the_local_zoo_is_asked_first(service, tmp_path):
    model = tmp_path / "zoo" / V1.removeprefix("zoo:")
    (model / "training").mkdir(parents=True)
    (model / "training" / "model.pt").write_text("ours")
    (model / "recipe.md").write_text("our recipe")
    places = tmp_path / "cache", tmp_path / "zoo"
    file = locate(V1, *places)
    assert (file.path, file.downloaded) == (model / "training" / "model.pt", False)
    assert file.origin.startswith(f"local zoo {V1} (sha256 ")
    assert fetch_recipe(V1, *places) == model / "recipe.md"
    assert service.queries == []
    with pytest.raises(SourceUnavailable, match=r"It has model\.pt; choose with \?checkpoint="):
        locate(f"{V1}?checkpoint=other.pt", *places)


def test_a_stub_is_a_source_as_any_other(service, tmp_path):
    source = SourceConfig(uri=V2)
    assert cached(source, tmp_path) is None
    file = fetch(source, tmp_path)
    assert file.origin.startswith(V2)
    assert cached(source, tmp_path).path == file.path


def test_the_stub_of_a_checkpoint_names_no_recipe(service, tmp_path):
    with pytest.raises(ConfigError, match="one that names no recipe"):
        locate(f"{V1}?recipe=original", tmp_path, tmp_path)
    assert service.queries == []


ANSWERS = {
    "error": ({"errors": [{"message": "no field\nand more"}]}, "no field"),
    "nothing": ({}, "data"),
    "a list": ([], "list indices"),
    "odd": ({"data": {"models": [{"files": [{"displayName": "x"}]}]}}, "fileType"),
}


@pytest.mark.parametrize(("answer", "word"), ANSWERS.values(), ids=list(ANSWERS))
def test_an_answer_that_is_none_is_told_in_one_line(service, tmp_path, answer, word):
    service.answer(answer)
    with pytest.raises(SourceUnavailable, match=word) as raised:
        fetch_recipe(V1, tmp_path, tmp_path / "zoo")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("models", [[], [{"files": []}]])
def test_a_model_that_is_not_known_is_told(service, tmp_path, models):
    service.answer({"data": {"models": models}})
    with pytest.raises(SourceUnavailable, match="knows no such model") as raised:
        locate(V1, tmp_path, tmp_path / "zoo")
    assert V1 in str(raised.value)


def test_a_recipe_that_it_has_not_is_told_with_those_that_it_has(service, tmp_path):
    with pytest.raises(SourceUnavailable, match=r"the recipe x, but found recipe_original\.md, recipe_tr"):
        fetch_recipe(f"{V1}?recipe=x", tmp_path, tmp_path / "zoo")


def test_a_service_that_is_gone_says_what_to_do(service, tmp_path):
    service.server.posts.clear()
    with pytest.raises(SourceUnavailable) as raised:
        fetch_recipe(V1, tmp_path, tmp_path / "zoo")
    message = str(raised.value)
    assert message.startswith(f"SparseZoo does not answer for {V1}?recipe=original (HTTP Error 404")
    assert "recipe.file=PATH" in message
    assert "\n" not in message
    assert not [path for path in (tmp_path / "files").rglob("*") if path.is_file()]


def test_a_host_that_never_answers_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "_READ_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("SPARSEZOO_API_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(SourceUnavailable, match=r"does not answer.*timed out"):
            locate(V1, tmp_path, tmp_path / "zoo")
        assert time.monotonic() - started < 10
