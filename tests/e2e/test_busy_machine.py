"""A benchmark of real engines while another program keeps a core busy: no ratio is wrong without a mark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparse_exp.benchmark.ratios import ratio_of_rows

SQUARE = Path(__file__).parents[2] / "benchmarks" / "square.py"
pytestmark = pytest.mark.slow


@contextmanager
def busy() -> Iterator[None]:
    """A process of its own session, which so gets a share of the CPUs of its own."""
    command = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            yield
        finally:
            process.kill()


def test_no_ratio_is_wrong_without_a_mark(deployment, tmp_path):
    def rows(name: str) -> dict[str, dict]:
        files = {"onnxruntime": "dense.onnx", "openvino": "dense.onnx", "deepsparse": "dense.onnx"}
        words = [f"--cell=n={engine}:dense:{deployment / file}" for engine, file in files.items()]
        words += ["--seconds", "0.5", "--warmup", "0.1", "--max-warmup", "2", "--tune-s", "0"]
        words += ["--budget-s", "20", "--imgsz", "64", "--out", str(tmp_path / f"{name}.json")]
        environment = {**os.environ, "SPARSE_EXP_LOCKS": str(tmp_path)}
        command = [sys.executable, SQUARE, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / f"{name}.json").read_text())
        return {row["engine"]: row for row in found if "impossible" not in row}

    quiet = rows("quiet")
    with busy():
        disturbed = rows("disturbed")
    assert quiet.keys() == disturbed.keys() >= {"onnxruntime", "openvino"}
    for engine, row in disturbed.items():
        truth = ratio_of_rows(quiet[engine], quiet["onnxruntime"])
        found = ratio_of_rows(row, disturbed["onnxruntime"])
        marked = row["noisy"] or disturbed["onnxruntime"]["noisy"] or quiet[engine]["noisy"]
        assert marked or found.value == pytest.approx(truth.value, rel=0.1)
    # Two threads on two cores, one of which is taken: the kernel's count shows it.
    assert max(row["waited"] for row in disturbed.values()) > 0.02 or (os.cpu_count() or 1) > 2
