"""A data set with files that cannot be used, from the fetch stage to the report."""

from __future__ import annotations

import json

import pytest
from command import command_line

from sparse_exp.data.digits import materialize

__all__ = ["command_line"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Digits, of which one training image is cut short and one training label names an unknown class."""
    yaml = materialize(tmp_path_factory.mktemp("mit Leerzeichen ü") / "set", imgsz=64, train=8, val=4, test=2)
    images = sorted((yaml.parent / "images" / "train").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:100])
    label = yaml.parent / "labels" / "train" / f"{images[1].stem}.txt"
    label.write_text("99 0.5 0.5 0.2 0.2\n")
    return yaml


@pytest.fixture
def run(tmp_path, damaged, monkeypatch, command_line):
    """A function that runs two stages on that data set, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    words = ["experiment=smoke", "tracker=none", "paths.run=run", "stages=[fetch,report]", "dataset=custom"]
    return lambda *more: command_line(*words, f"dataset.path='{damaged}'", "dataset.imgsz=64", *more)


def test_refused_with_one_line_that_says_what_to_do(run):
    ended = run()
    assert ended.code == 1
    assert len(ended.error.splitlines()) == 1
    assert ended.error.startswith("Error: Cannot read the image")
    assert "2 of 14 images" in ended.error
    assert "dataset.on_corrupt=skip" in ended.error


def test_skipped_with_a_count_in_manifest_and_report(run, tmp_path):
    ended = run("dataset.on_corrupt=skip")
    assert ended.code == 0, ended.output
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["stages"]["fetch"]["facts"]["skipped"] == 2
    assert "2 images were left out" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
