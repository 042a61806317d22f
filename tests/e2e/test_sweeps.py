"""Whole sweeps on generated digits: one parent with its children, launchers, and kill -9 at every point."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from percentiles import needs_many_inferences

pytestmark = pytest.mark.slow

SMOKE = [
    "-m", "experiment=smoke", "recipe.variables.num_epochs=3", "trainer.threads=1",
    "hardware.engines=[onnxruntime]",
]  # fmt: skip
SIX = [*SMOKE, "model=yolov5n,yolov5s", "recipe=dense,transfer,transfer_quant"]
TWO = [*SMOKE, "model=yolov5n", "recipe=dense,transfer_quant"]
# What two runs of the same job on this machine agree in to the last digit: everything but times.
TIMED = ("time/", "benchmark/")


@dataclass
class Place:
    """A directory to start sweeps in."""

    cwd: Path
    cache: Path

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "SPARSE_EXP_CACHE": str(self.cache), "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        return subprocess.Popen(
            [sys.executable, "-m", "sparse_exp", *words], cwd=self.cwd, env=environment, text=True,
            stdout=(self.cwd / "console").open("a"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, *words: str, code: int = 0) -> str:
        """Start a sweep and wait for its end; what it printed."""
        begin = len(self.console)
        process = self.start(*words)
        assert process.wait(timeout=900) == code, self.console[begin:][-4000:]
        return self.console[begin:]

    @property
    def console(self) -> str:
        file = self.cwd / "console"
        return file.read_text() if file.is_file() else ""

    @property
    def sweep(self) -> Path:
        (found,) = (self.cwd / "outputs" / "sweeps").iterdir()
        return found

    @property
    def jobs(self) -> dict[str, dict]:
        """The manifests of the jobs by name, in the order of their numbers."""
        found = {
            path.parent.name: json.loads(path.read_text()) for path in self.sweep.glob("*/manifest.json")
        }
        return {name: found[name] for name in sorted(found) if found[name].get("job") is not None}

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """What must be the same again, for each job."""
        return {
            name: {
                key: value
                for key, value in json.loads((self.sweep / name / "result.json").read_text()).items()
                if not key.startswith(TIMED)
            }
            for name in self.jobs
        }

    def tracked(self, query: str) -> list[tuple]:
        with sqlite3.connect(self.cwd / "outputs" / "mlflow" / "mlflow.db") as connection:
            return connection.execute(query).fetchall()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(tmp_path, cache) -> Iterator[Place]:
    yield Place(tmp_path, cache)
    for process in psutil.process_iter(["cwd"]):  # what was left by a test that failed
        if process.info["cwd"] and process.info["cwd"].startswith(str(tmp_path)):
            process.kill()


@pytest.fixture(scope="module")
def serial(tmp_path_factory, cache) -> Place:
    """The six jobs one after the other; do not change it."""
    found = Place(tmp_path_factory.mktemp("serial"), cache)
    found.run(*SIX)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache) -> dict[str, dict[str, float]]:
    """What the two jobs come to when nobody disturbs them."""
    found = Place(tmp_path_factory.mktemp("undisturbed"), cache)
    found.run(*TWO, "tracker=none")
    return found.results


def no_run_is_open(place: Place) -> bool:
    return (
        place.tracked("select name from runs where status = 'RUNNING' and lifecycle_stage = 'active'") == []
    )


def intervals(place: Place) -> list[tuple[datetime, datetime]]:
    """When each job measured, in the order of time."""
    found = []
    for name in place.jobs:
        rows = json.loads((place.sweep / name / "benchmark.json").read_text())
        found.append(tuple(datetime.fromisoformat(rows[0][key]) for key in ("started", "ended")))
    return sorted(found)


def check_alone(place: Place) -> None:
    measured = intervals(place)
    assert len(measured) == 6
    assert all(start < end for start, end in measured)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(measured))


def test_six_jobs_are_children_of_one_parent(serial):
    assert [job["status"] for job in serial.jobs.values()] == ["FINISHED"] * 6
    ((parent,),) = serial.tracked(f"select run_uuid from runs where name = '{serial.sweep.name}'")
    tagged = dict(serial.tracked("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
    assert list(tagged.values()) == [parent] * 6
    assert serial.tracked("select distinct status from runs") == [("FINISHED",)]
    notes = dict(serial.tracked("select run_uuid, value from tags where key = 'mlflow.note.content'"))
    assert "6 of 6 jobs finished" in notes[parent]
    assert all(name in notes[parent] for name in serial.jobs)
    kept = (serial.cwd / "outputs/mlflow/artifacts" / parent / "artifacts").rglob("*")
    files = {"compare.csv", "compare.md", "compare.png", "compare.html", "multirun.yaml"}
    assert files <= {path.name for path in kept}


def test_params_metrics_and_tags_of_children_are_uniform(serial):
    # So that MLflow's table, scatter and parallel-coordinates views work at once.
    jobs = [run for (run,) in serial.tracked("select run_uuid from tags where key = 'sweep.job'")]
    for table in ("params", "latest_metrics", "tags"):
        rows = serial.tracked(f"select run_uuid, key from {table}")
        each = [{key for run, key in rows if run == job} for job in jobs]
        own = set.union(*each) - set.intersection(*each)
        # What only some have: places of their start checkpoints, variables of their recipes, other rates for
        # biases, what a baseline is found by, a graph of quantized networks, what is known of a dense network
        # only where it was trained, also of single classes. MLflow samples the system when it can.
        expected = (
            "model.sources",
            "model.grow_from",
            "recipe.variables",
            "lr/",
            "system/",
            "fingerprint.dense",
            "size/qdq/",
            "size/onnxruntime/",
            "deployed/onnxruntime/dense/",
            "class/",
            "size/dense_checkpoint_mb",
        )
        percentiles = set(filter(needs_many_inferences, own))
        assert not [key for key in own - percentiles if not key.startswith(expected)], table


def test_again_all_are_kept(serial):
    console = serial.run(*SIX)
    assert console.count(": kept.") == 6
    assert "6 of 6 jobs finished" in console


@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_launchers_in_parallel_give_the_same(place, serial, launcher):
    place.run(*SIX, f"launcher={launcher}", "launcher.jobs=2")
    assert place.results == serial.results
    check_alone(place)
    assert no_run_is_open(place)
    assert place.tracked("select count(*) from tags where key = 'sweep.job'") == [(6,)]


def wait_for(place: Place, process: subprocess.Popen[str], text: str, times: int = 1) -> None:
    deadline = time.monotonic() + 300
    while place.console.count(text) < times:
        assert process.poll() is None, place.console[-4000:]
        assert time.monotonic() < deadline, place.console[-4000:]
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("text", "times"),
    [("\nepoch 2 ", 1), ("\nepoch 2 ", 2), ("== export", 1), ("== benchmark", 2)],
    ids=["training", "training of the second", "export", "benchmark"],
)
def test_a_killed_launcher_loses_at_most_an_epoch(place, undisturbed, text, times):
    process = place.start(*TWO)
    wait_for(place, process, text, times)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = place.console
    again = place.run(*TWO)
    assert place.results == undisturbed
    assert no_run_is_open(place)
    assert place.tracked("select count(*) from tags where key = 'sweep.job'") == [(2,)]
    seen = before.count("\nepoch ") + again.count("\nepoch ")
    assert seen <= 7, "more epochs were trained again than the one in progress"


def test_a_killed_worker_is_made_up_for(place, undisturbed):
    process = place.start(*TWO, "launcher=joblib", "launcher.jobs=2")
    wait_for(place, process, "epoch 2 ")
    manifest = next(path for path in place.sweep.glob("*/manifest.json") if '"RUNNING"' in path.read_text())
    holder = (manifest.parent / ".lock").read_text()  # process 4711 on host
    os.kill(int(holder.split()[1]), signal.SIGKILL)
    assert process.wait(timeout=300) == 1
    assert no_run_is_open(place)
    place.run(*TWO, "launcher=joblib", "launcher.jobs=2")
    assert place.results == undisturbed
    assert no_run_is_open(place)


def test_what_to_ship_is_answered_with_a_file_and_a_command_that_shares_the_dense_network(place):
    words = [*SMOKE, "sweep=ship", "recipe=quant,slim_quant_30", "recovery.baseline=auto", "tracker=none"]
    said = place.run(*words, "sweep.max_loss=1.0")
    dense = [
        path.parent.name
        for path in place.sweep.glob("*/manifest.json")
        if json.loads(path.read_text()).get("job") is None
    ]
    assert len(dense) == 1  # trained once, for both
    (sentence,) = [line for line in said.splitlines() if line.startswith("Ship ")]
    file = Path(sentence.removeprefix("Ship ").partition(" in ONNX Runtime: ")[0])
    assert (place.cwd / file).is_file()
    assert "made by: python -m sparse_exp experiment=smoke" in sentence
    page = (place.sweep / "compare" / "ship.md").read_text()
    assert sentence in page
    assert page.count("| dense | dense |") == 1  # both jobs measured it; it is one file
    assert (place.sweep / "compare" / "ship.png").is_file()
    again = place.run(*words, "sweep.max_loss=0.0")  # another question to the same jobs
    assert again.count(": kept.") == 2
