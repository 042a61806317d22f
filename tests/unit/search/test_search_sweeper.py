"""The sweeper inside Hydra: real launches of a task that only pretends to train, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The package's configuration and presets, with another task below.
APP = """
import json, logging, os, sys, time
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from sparse_exp.config.places import register_schema
from sparse_exp.resolve import CONF_DIRECTORY

def task(config):
    job = HydraConfig.get()
    word = {"job": job.job.num, "words": list(job.overrides.task)}
    with open("launched.jsonl", "a") as file:
        file.write(json.dumps(word) + "\\n")
    if Path("sleep_in").is_file() and Path("sleep_in").read_text() == str(job.job.num):
        time.sleep(60)
    if Path("fail_in").is_file() and Path("fail_in").read_text() == str(job.job.num):
        raise ValueError("it was asked to fail")
    size, sparsity = config.model.size, config.model.sparsity
    values = (0.5 - sparsity**2 / 10 - 0.2 * (size == "n"), 10 * sparsity + 5 * (size == "n"))
    return values[: len(config.sweep.objectives)]

if __name__ == "__main__":
    register_schema()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    hydra.main(version_base="1.3", config_path=str(CONF_DIRECTORY), config_name="config")(task)()
"""
WORDS = [
    "sweep=pareto", "sweep.name=s", "sweep.trials=4", "model=yolov5n,yolov5s", "recipe=transfer",
    "tracker=none", "recipe.pattern=unstructured", "dataset.imgsz=224", "~hydra.callbacks.sweep",
]  # fmt: skip


class App:
    """The program in a directory of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "app.py").write_text(APP, encoding="utf-8")

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "app.py", "-m", *WORDS, *words], cwd=self.root, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "HYDRA_FULL_ERROR": "1"},
        )  # fmt: skip

    def run(self, *words: str) -> tuple[int, str]:
        with self.start(*words) as process:
            output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def launched(self) -> list[tuple[int, tuple[str, ...]]]:
        """Number and searched words of each launch since the last call."""
        file = self.root / "launched.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        file.unlink(missing_ok=True)
        searched = ("model=", "model.sparsity=")
        return [(row["job"], tuple(w for w in row["words"] if w.startswith(searched))) for row in rows]

    @property
    def found(self) -> dict:
        return json.loads((self.root / "outputs/sweeps/s/search.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A search that nothing happens to: its program and what it launched."""
    app = App(tmp_path_factory.mktemp("app"))
    code, output = app.run()
    assert code == 0, output
    return app, app.launched(), output


def test_a_search_launches_its_trials_and_says_what_is_best(undisturbed):
    app, launched, output = undisturbed
    assert [number for number, _ in launched] == [0, 1, 2, 3]
    assert len({words for _, words in launched}) == 4
    assert "The Pareto front" in output
    assert app.found["objectives"] == {
        "val/map50": "maximize",
        "benchmark/deepsparse/sparse/b1/items_per_s": "maximize",
    }
    assert app.found["jobs"] == {"ended": 4, "failed": 0}
    assert (app.root / "outputs/sweeps/s/multirun.yaml").is_file()
    for job in app.found["all"]:  # what is written of a job is what it was launched with
        assert tuple(f"{key}={value}" for key, value in job["parameters"].items()) == launched[job["job"]][1]


@pytest.mark.slow
def test_killed_and_started_again_it_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    app = App(tmp_path)
    (tmp_path / "sleep_in").write_text("2")
    process = app.start()
    deadline = time.monotonic() + 100
    file = tmp_path / "launched.jsonl"
    while not (file.is_file() and len(file.read_text().splitlines()) == 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = app.launched()
    (tmp_path / "sleep_in").unlink()
    code, output = app.run()
    assert code == 0, output
    after = app.launched()
    assert [number for number, _ in after] == [2, 3]
    assert before[:2] + after == undisturbed[1]
    assert app.found == undisturbed[0].found
    assert app.run()[0] == 0  # finished: nothing is launched
    assert app.launched() == []


@pytest.mark.slow
def test_a_failed_job_lets_the_others_run_and_may_be_repeated(undisturbed, tmp_path):
    app = App(tmp_path)
    (tmp_path / "fail_in").write_text("1")
    code, output = app.run()
    assert code == 1
    assert "it was asked to fail" in output
    assert len(app.launched()) == 4
    failed = app.found["all"][1]
    assert (failed["state"], failed["failure"]) == ("FAILED", "it was asked to fail")
    (tmp_path / "fail_in").unlink()
    code, output = app.run("sweep.rerun=failed")
    assert code == 0, output
    assert app.launched() == [undisturbed[1][1]]
    assert app.found["jobs"] == {"ended": 4, "failed": 0}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["sweep.objectives=[mapp50]"], "Nearest: map50"),
        (["model.sparsity=interval(0.5,1.5)"], "Expected model.sparsity to be at least 0.0 and at most 0.99"),
        (["model=yolov5s,yolov5q"], "yolov5q"),
    ],
)
@pytest.mark.slow
def test_what_cannot_run_is_refused_before_the_first_job(tmp_path, words, problem):
    app = App(tmp_path)
    code, output = app.run(*words)
    assert code == 1
    assert problem in output
    assert app.launched() == []
    assert not (tmp_path / "outputs/sweeps/s/study.db").exists()


def test_optuna_is_imported_by_a_search_only():
    code = """if True:
        import sys
        from hydra.core.plugins import Plugins
        names = {plugin.__name__ for plugin in Plugins.instance().discover()}
        assert "SearchSweeper" in names, names
        assert not {"optuna", "sqlalchemy", "torch", "ray", "joblib"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
