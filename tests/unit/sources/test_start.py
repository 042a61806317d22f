from __future__ import annotations

import hashlib
import logging
import shutil

import pytest
import torch
import webserver

from sparse_exp.config.schema import ModelConfig, SourceConfig
from sparse_exp.errors import ConfigError, SourceUnavailable, SparseExpError
from sparse_exp.sources.start import SCRATCH, cached_start, fetch_start, locate, require_place
from sparse_exp.yolov5 import YOLOv5, save_checkpoint

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
DEAD = "http://127.0.0.1:9/b.pt"
OWN = "zoo:cv/detection/yolov5-s/pytorch/ultralytics/coco/pruned75_quant-none"  # of the shipped yolov5s
OTHER = "zoo:cv/detection/yolov5-s/pytorch/ultralytics/coco/pruned99_quant-none"
STUB = "zoo:cv/detection/yolov5-n/pytorch/ultralytics/coco/pruned40_quant-none"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "start.pt"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def places(tmp_path):
    """A cache and a local zoo; neither exists."""
    return tmp_path / "cache", tmp_path / "zoo"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of yolov5n that tells three classes apart."""
    path = tmp_path_factory.mktemp("small") / "small.pt"
    torch.manual_seed(0)
    model = YOLOv5("n", 3)
    values = {"names": "abc", "imgsz": 64, "recipe": "", "phase": "dense", "epoch": 1, "metrics": {}}
    save_checkpoint(path, model_state=model.state_dict(), size="n", num_classes=3, **values)
    return path


def model(*sources: SourceConfig | str, **more) -> ModelConfig:
    given = [source if isinstance(source, SourceConfig) else SourceConfig(source) for source in sources]
    return ModelConfig(name="yolov5s", size="s", sources=given, **more)


def test_scratch_fetches_nothing(places):
    from_nothing = model("/nowhere", weights=SCRATCH)
    assert fetch_start(from_nothing, *places) is None
    assert cached_start(from_nothing, *places) is None
    assert not places[0].exists()


def test_weights_win_over_everything(places, file, small):
    chosen = model("/nowhere", weights=str(file), grow_from=[SourceConfig(str(small))], stub=STUB)
    start = fetch_start(chosen, *places)
    assert (start.file.path, start.file.sha256, start.grown) == (file, SHA256, False)
    assert start.name == start.file.origin
    assert str(file) in start.name
    missing = model(str(file), weights="/nowhere", grow_from=[SourceConfig(str(small))])
    with pytest.raises(SourceUnavailable, match="/nowhere"):
        fetch_start(missing, *places)
    assert cached_start(missing, *places) is None


def test_the_first_source_that_serves_is_taken(places, tmp_path, file, caplog):
    other = tmp_path / "other.pt"
    other.write_bytes(b"other")
    tried = model("/nowhere/a.pt", SourceConfig(str(file), SHA256), str(other))
    assert fetch_start(tried, *places).file.path == file


def test_what_is_here_is_taken_before_anything_is_fetched(places, file, monkeypatch):
    monkeypatch.setattr("sparse_exp.sources.start.fetch", lambda *_: pytest.fail("asked the network"))
    assert fetch_start(model(DEAD, str(file)), *places).file.path == file


def test_when_none_serves_each_ones_reason_is_named(places):
    with pytest.raises(SourceUnavailable) as raised:
        fetch_start(model("/nowhere/a.pt", DEAD, grow_from=[SourceConfig("/nowhere/smaller.pt")]), *places)
    message = str(raised.value)
    wanted = ("/nowhere/a.pt", DEAD, "/nowhere/smaller.pt", "model.weights=PATH", "model.weights=scratch")
    assert all(text in message for text in wanted)
    assert "\n" not in message
    assert not list(places[0].rglob("*.pt"))


def test_with_nothing_smaller_random_weights_must_be_asked_for(places):
    with pytest.raises(SourceUnavailable) as raised:
        fetch_start(model(), *places)
    assert str(raised.value).startswith("yolov5s names no source. There is no smaller size to grow it from.")


def test_a_file_with_another_hash_is_refused(places, file):
    with pytest.raises(SourceUnavailable) as raised:
        fetch_start(model(SourceConfig(str(file), sha256="0" * 64)), *places)
    assert "0" * 64 in str(raised.value)
    assert SHA256 in str(raised.value)
    assert "\n" not in str(raised.value)


def test_cached_start_looks_without_fetching(places, file):
    assert cached_start(model(DEAD), *places) is None
    assert cached_start(model(DEAD, str(file)), *places).file.path == file


@pytest.mark.parametrize(("trained_on", "name"), [("coco", "coco"), (None, "3 classes")])
def test_the_last_resort_is_a_smaller_size_to_grow(places, small, caplog, trained_on, name):
    growing = model(
        DEAD, grow_from=[SourceConfig("/nowhere.pt"), SourceConfig(str(small), trained_on=trained_on)]
    )
    with caplog.at_level(logging.INFO, logger="sparse_exp"):
        start = fetch_start(growing, *places)
    assert (start.name, start.grown, start.file.path) == (f"grown:yolov5n({name})", True, small)
    assert [r.getMessage() for r in caplog.records][-1].startswith(
        f"No yolov5s can be had: its start is grown:yolov5n({name}), from {small} (sha256 "
    )
    assert cached_start(growing, *places) == start


def test_its_own_size_is_asked_for_before_growing_from_what_is_here(places, small, server):
    growing = model(f"{server.url}/s.pt", grow_from=[SourceConfig(str(small))])
    assert cached_start(growing, *places).grown
    start = fetch_start(growing, *places)
    assert (start.grown, start.file.downloaded) == (False, True)
    assert not cached_start(growing, *places).grown


@pytest.mark.parametrize("hashed", ["fragment", "argument"])
def test_a_hash_may_stand_behind_an_address(places, server, hashed):
    def call(digest):
        if hashed == "fragment":
            return locate(f"{server.url}/w.pt#sha256={digest}", *places)
        return locate(f"{server.url}/w.pt", *places, sha256=digest)

    with pytest.raises(SourceUnavailable, match="0" * 64):
        call("0" * 64)
    assert call(webserver.SHA256).path.read_bytes() == webserver.CONTENT
    assert server.requests[-1] == "/w.pt"


@pytest.mark.parametrize("fragment", ["", "sha256=", "sha256=xyz", "md5=" + "0" * 32, "0" * 64])
def test_a_malformed_hash_is_refused_before_anything_is_fetched(places, fragment):
    with pytest.raises(ConfigError, match=r"what follows # in http.*/w\.pt to be sha256=<64 hex") as raised:
        locate(f"http://127.0.0.1:9/w.pt#{fragment}", *places)
    assert "\n" not in str(raised.value)


def test_two_different_hashes_are_refused(places):
    with pytest.raises(ConfigError, match="Name one hash only"):
        locate(f"{DEAD}#sha256={'0' * 64}", *places, sha256="1" * 64)


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("zoo:foo", "Expected the SparseZoo stub to be zoo:DOMAIN"),
        (f"{STUB}?checkpoint=", "what follows ? in"),
        (f"{STUB}?recipe=original", "one that names no recipe"),
        ("index:tiny", "index:<distribution>==<version>!<path inside>"),
        (f"{DEAD}#sha256=abc", "sha256=<64 hex digits>"),
        ("/nowhere.pt", "Expected model.weights to be an existing file, but got '/nowhere.pt'. Give a path"),
        ("empty", "a checkpoint"),
    ],
)
def test_what_is_no_place_is_told_without_the_network(tmp_path, monkeypatch, uri, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SparseExpError) as raised:
        require_place("model.weights", uri, "'scratch'")
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_places_that_may_hold_a_checkpoint_pass(tmp_path, file):
    (tmp_path / "model" / "training").mkdir(parents=True)
    shutil.copy(file, tmp_path / "model" / "training" / "model.pt")
    places = (file, tmp_path / "model", STUB, f"{STUB}?checkpoint=preqat", DEAD, "index:a==1!b.pt")
    for uri in map(str, places):
        require_place("model.weights", uri, "'scratch'")


def test_a_directory_in_sparsezoos_layout(tmp_path, places):
    folder = tmp_path / "mödel one"
    (folder / "training").mkdir(parents=True)
    for name in ("model.pt", "checkpoint_preqat.pt"):
        (folder / "training" / name).write_text(name)
    start = fetch_start(model(weights=str(folder)), *places)
    assert start.file.path.read_text() == "checkpoint_preqat.pt"
    assert cached_start(model(weights=str(folder)), *places) == start


def test_a_stub_that_was_chosen_is_never_replaced_by_another_start(places, file, small, monkeypatch):
    monkeypatch.setenv("SPARSEZOO_API_URL", DEAD)
    wanted = model(str(file), stub=OTHER, grow_from=[SourceConfig(str(small))])
    assert cached_start(wanted, *places) is None
    with pytest.raises(SourceUnavailable) as raised:
        fetch_start(wanted, *places)
    assert OTHER in str(raised.value)
    assert "model.weights=PATH" in str(raised.value)
    folder = places[1] / OTHER.removeprefix("zoo:")
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "model.pt").write_bytes(b"published")
    assert fetch_start(wanted, *places).name.startswith(f"local zoo {OTHER}")


def test_the_stub_of_a_shipped_model_is_named_where_the_zoo_does_not_have_it(places, file, caplog):
    caplog.set_level(logging.INFO)
    assert fetch_start(model(str(file), stub=OWN), *places).file.path == file
    assert f"No pruned start: {OWN} is not in the local zoo." in caplog.text


def test_what_was_published_under_the_models_stub_serves_first(places, file, tmp_path):
    folder = places[1] / STUB.removeprefix("zoo:")
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "model.pt").write_bytes(b"published")
    for look in (fetch_start, cached_start):
        start = look(model(str(file), stub=STUB), *places)
        assert start.file.path.read_bytes() == b"published"
        assert start.name.startswith(f"local zoo {STUB} (sha256 ")
        assert look(model(str(file), stub=STUB, weights=str(file)), *places).file.path == file
