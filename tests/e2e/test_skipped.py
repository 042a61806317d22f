"""A data set with files that cannot be used, from the fetch stage to the report."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sparse_exp.data.digits import materialize


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Digits, of which one training image is cut short and one training label names an unknown class."""
    yaml = materialize(tmp_path_factory.mktemp("mit Leerzeichen ü") / "set", imgsz=64, train=8, val=4, test=2)
    images = sorted((yaml.parent / "images" / "train").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:100])
    label = yaml.parent / "labels" / "train" / f"{images[1].stem}.txt"
    label.write_text("99 0.5 0.5 0.2 0.2\n")
    return yaml


def _run(folder, damaged, *words):
    command = [sys.executable, "-m", "sparse_exp", "experiment=smoke", "tracker=none", "paths.run=run"]
    command += ["dataset=custom", f"dataset.path='{damaged}'", "dataset.imgsz=64", "stages=[fetch,report]"]
    return subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, timeout=300)


def test_refused_with_one_line_that_says_what_to_do(tmp_path, damaged):
    done = _run(tmp_path, damaged)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("Error: Cannot read the image")
    assert "2 of 14 images" in error
    assert "dataset.on_corrupt=skip" in error


@pytest.mark.slow
def test_skipped_with_a_count_in_manifest_and_report(tmp_path, damaged):
    done = _run(tmp_path, damaged, "dataset.on_corrupt=skip")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["stages"]["fetch"]["facts"]["skipped"] == 2
    assert "2 images were left out" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
