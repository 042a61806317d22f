"""``python -m sparse_exp.compare`` as a process of its own."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest

from sparse_exp.files import write_json
from sparse_exp.locks import alone_in
from sparse_exp.runs.directory import Run, StageRecord


@pytest.fixture
def compare(tmp_path):
    """Runs the command in a directory with a sweep of three; says what it imported."""
    values = {"0-n": (60.0, 0.45, 1.0), "1-s": (40.0, 0.62, 3.0), "2-broken": (None, 0.7, None)}
    for name, (speed, map50, size) in values.items():
        run = Run.create(tmp_path / "outputs" / "sweeps" / "day" / name, overwrite=False)
        run.update(name=name, overrides=[f"model=yolov5{name[-1]}", "hardware.batch_sizes=[1]"])
        metrics = {"benchmark/deepsparse/sparse/b1/items_per_s": speed, "size/onnx_gzip_mb": size}
        known = {key: value for key, value in metrics.items() if value is not None}
        run.record("verify", StageRecord("mark", metrics={**known, "val/map50": map50}))
        write_json(run.path / "result.json", run.result())
        run.update(status="FAILED" if speed is None else "FINISHED")
    code = (
        "import sys; from sparse_exp.compare.__main__ import main, run_command\n"
        "try: run_command(main)\n"
        "finally: print([m for m in ('torch', 'mlflow', 'hydra') if m in sys.modules], file=sys.stderr)"
    )

    def run_it(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        return subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, env=environment,
        )  # fmt: skip

    return run_it


def test_the_headline_command(compare, tmp_path):
    (tmp_path / "picture").mkdir()
    (tmp_path / "picture" / ".compare.4711.part.png").touch()  # of one that was killed
    done = compare("--best", "map50>=0.6, size<=4", "--by", "items_per_s", "--out", "picture")
    assert (done.returncode, done.stderr) == (0, "[]\n")  # and nothing heavy was imported
    lines = done.stdout.splitlines()
    cells = {line.split()[-5]: line.split() for line in lines if "-n " in line or "-s " in line}
    assert cells["0-n"][0] == cells["1-s"][0] == "*"
    assert any(line.strip().startswith("FAILED") and "2-broken" in line for line in lines)
    assert "Make it again: python -m sparse_exp model=yolov5s 'hardware.batch_sizes=[1]'" in lines
    assert {path.name for path in (tmp_path / "picture").iterdir()} == {
        f"compare.{suffix}" for suffix in ("csv", "md", "png", "html")
    }
    rows = list(csv.DictReader((tmp_path / "picture" / "compare.csv").open()))
    assert [row["run"] for row in rows] == ["1-s", "0-n", "2-broken"]


def test_two_at_once_do_not_write_into_one_directory(compare, tmp_path):
    with alone_in(tmp_path / "picture", "A comparison is being written"):
        done = compare("--out", "picture")
    assert done.returncode == 1
    assert "being written into picture by process" in done.stderr
    assert not (tmp_path / "picture").exists()


def test_json_is_all_that_is_printed(compare):
    done = compare("outputs", "--json", "--by", "items_per_s")
    assert json.loads(done.stdout)["best"]["run"] == "0-n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "Expected RUN to be"),
        (["--x", "itms_per_s"], "Nearest: items_per_s"),
        (["--best", "map50>=0.99"], "none keeps all limits"),
        (["--experiment", "trees"], "a database with runs"),
        (["--out", "outputs/sweeps/day/1-s/result.json"], "a directory to write into"),
    ],
)
def test_bad_input_is_one_line(compare, words, said):
    done = compare(*words)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("[") or lines[0].startswith("Error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
