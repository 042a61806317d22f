from __future__ import annotations

import hashlib
import logging

import pytest

from sparse_exp.config.schema import ModelConfig, SourceConfig
from sparse_exp.errors import SourceUnavailable
from sparse_exp.zoo.start import SCRATCH, cached_start, fetch_start, sources_of

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "start.pt"
    path.write_bytes(CONTENT)
    return path


def model(*sources: SourceConfig, weights: str | None = None) -> ModelConfig:
    return ModelConfig(name="yolov5n", size="n", sources=list(sources), weights=weights)


def test_scratch_fetches_nothing(tmp_path):
    from_nothing = model(SourceConfig("/nowhere"), weights=SCRATCH)
    assert fetch_start(from_nothing, tmp_path / "cache") is None
    assert cached_start(from_nothing, tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()


def test_weights_win_over_sources(tmp_path, file):
    chosen = model(SourceConfig("/nowhere"), weights=str(file))
    assert [source.uri for source in sources_of(chosen)] == [str(file)]
    found = fetch_start(chosen, tmp_path / "cache")
    assert found.path == file
    assert found.sha256 == SHA256
    assert str(file) in found.origin


def test_the_first_source_that_serves_is_taken(tmp_path, file, caplog):
    other = tmp_path / "other.pt"
    other.write_bytes(b"other")
    tried = model(SourceConfig("/nowhere/a.pt"), SourceConfig(str(file), SHA256), SourceConfig(str(other)))
    with caplog.at_level(logging.INFO, logger="sparse_exp"):
        assert fetch_start(tried, tmp_path / "cache").path == file


def test_when_none_serves_each_ones_reason_is_named(tmp_path):
    tried = model(SourceConfig("/nowhere/a.pt"), SourceConfig("http://127.0.0.1:9/b.pt"))
    with pytest.raises(SourceUnavailable) as raised:
        fetch_start(tried, tmp_path / "cache")
    message = str(raised.value)
    assert "/nowhere/a.pt" in message
    assert "http://127.0.0.1:9/b.pt" in message
    assert "model.weights=PATH" in message
    assert "model.weights=scratch" in message
    assert "\n" not in message
    assert not list((tmp_path / "cache").rglob("*.pt"))


def test_a_model_without_sources_says_so(tmp_path):
    with pytest.raises(SourceUnavailable, match=r"yolov5n names no source\. Give a checkpoint"):
        fetch_start(model(), tmp_path)


def test_a_file_with_another_hash_is_refused(tmp_path, file):
    wrong = model(SourceConfig(str(file), sha256="0" * 64))
    with pytest.raises(SourceUnavailable) as raised:
        fetch_start(wrong, tmp_path / "cache")
    assert "0" * 64 in str(raised.value)
    assert SHA256 in str(raised.value)
    assert "\n" not in str(raised.value)


def test_cached_start_looks_without_fetching(tmp_path, file):
    assert cached_start(model(SourceConfig("http://127.0.0.1:9/b.pt")), tmp_path / "cache") is None
    assert cached_start(model(SourceConfig("http://127.0.0.1:9/b.pt"), SourceConfig(str(file))), tmp_path)
