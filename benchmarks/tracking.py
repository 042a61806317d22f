"""Measure the time of `compare` over many runs, and the share of a run's time that MLflow takes.

    python benchmarks/tracking.py                          # 1,000 runs of 200 metrics each
    python benchmarks/tracking.py --runs 5000 --server     # and of a server, which is asked for the newest
    python benchmarks/tracking.py --runs 100 --log outputs/runs/2026-11-22/17-35-11-yolov5s-trees

All files are made in a temporary folder. The project's own code writes the run directories. MLflow makes a
database with one run, whose rows are then copied. With ``--log RUN`` the epochs, stages and files of that run
are tracked again, and the time of the calls is compared with that of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from sparse_exp.command import Parser, run_command, whole
from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import SparseExpError
from sparse_exp.files import write_json
from sparse_exp.hardware import host_facts
from sparse_exp.runs.directory import Run, StageRecord
from sparse_exp.tracking import Artifact, Metrics, RunInfo, Tags
from sparse_exp.tracking.dashboard import free_port
from sparse_exp.tracking.mlflow import MlflowTracker, import_client

_NAMED = ("val/map50", "benchmark/deepsparse/sparse/b1/items_per_s", "size/onnx_gzip_mb")
_PARAMS = 90  # of a run of this project
_FILES = ("config.yaml", "recipe.md", "environment.txt", "report.md", "result.json", "manifest.json", "plots")


def main() -> int:
    """Measure and print the tables."""
    options = _options()
    print(f"{host_facts().cpu}, {host_facts().usable_cores} cores\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{f'{options.runs} runs of {options.metrics} metrics each':51} wall s    CPU s")
        _make_directories(folder / "runs", options.runs, options.metrics)
        _make_database(folder / "mlflow", options.runs, options.metrics)
        sources = {"run directories": [str(folder / "runs")], "MLflow, SQLite": ["--experiment", "many"]}
        store = ["--store", str(folder / "mlflow")]
        for label, words in sources.items():
            for what, more in (
                ("table", []),
                ("table, CSV, Markdown, PNG, HTML", ["--out", str(folder / "out")]),
            ):
                _measure(label, what, [*words, *store, *more], options.repeats)
        if options.server:
            with _serving(folder / "mlflow") as address:
                for newest in (50, 200):
                    words = ["--experiment", "many", "--uri", address, "--newest", str(newest)]
                    _measure("MLflow, server", f"table of the newest {newest}", words, options.repeats)
                some = ["--experiment", "many", "--uri", address, "--filter", "metrics.`val/map50` > 50"]
                _measure("MLflow, server", "table of those with val/map50 > 50", some, options.repeats)
        if options.log:
            print()
            _replay(options.log, folder / "replay")
    return 0


def _measure(label: str, what: str, words: list[str], repeats: int) -> None:
    wall, cpu = min(_compare(words) for _ in range(repeats))
    print(f"{label:16} {what:34} {wall:6.2f}   {cpu:6.2f}", flush=True)


@contextmanager
def _serving(store: Path) -> Iterator[str]:
    """The address of an MLflow server over a store, once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{store / 'mlflow.db'}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            if server.poll() is not None:
                raise SparseExpError("The MLflow server has ended. Start one by hand to see why.")
            time.sleep(0.5)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _compare(words: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of the whole command, from the start of the interpreter to its end."""
    command = [
        sys.executable,
        "-m",
        "sparse_exp.compare",
        *words,
        "--best",
        "size<=50",
        "--by",
        "items_per_s",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _values(index: int, count: int) -> dict[str, float]:
    draw = random.Random(index)
    names = [*_NAMED, *(f"verify/engine{number}/score_mean" for number in range(count - len(_NAMED)))]
    return {name: draw.random() * 60 for name in names}


def _make_directories(folder: Path, runs: int, metrics: int) -> None:
    for index in range(runs):
        run = Run.create(folder / f"{index}-run", overwrite=False)
        run.update(name=f"run-{index}", overrides=[f"seed={index}", "dataset=trees"], version="0.1.0")
        run.record("verify", StageRecord("mark", metrics=_values(index, metrics), seconds=1.0))
        write_json(run.path / "result.json", run.result())
        run.update(status="FINISHED")


def _make_database(store: Path, runs: int, metrics: int) -> None:
    """Let MLflow make one run, and copy its rows: its client would take minutes for all runs."""
    tracker = MlflowTracker(TrackerConfig(system_metrics=False), store)
    tracker.start(RunInfo("first", "many", {"seed": 0}, directory=store))
    tracker.log(Metrics(_values(0, metrics)))
    tracker.finish("FINISHED")
    with closing(sqlite3.connect(store / "mlflow.db")) as connection:
        for table in ("runs", "latest_metrics", "tags"):
            columns, rows = _rows(connection, table, str(tracker.run_id))
            place = columns.index("run_uuid")
            copies = (_copy(row, place, columns, index) for index in range(1, runs) for row in rows)
            marks = ", ".join("?" * len(columns))
            connection.executemany(f"INSERT INTO {table} VALUES ({marks})", copies)
        params = ((f"trainer.key{n}", str(n), f"{i:032x}") for i in range(1, runs) for n in range(_PARAMS))
        connection.executemany("INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)", params)
        connection.commit()


def _rows(connection: sqlite3.Connection, table: str, run_id: str) -> tuple[list[str], list[Any]]:
    found = connection.execute(f"SELECT * FROM {table} WHERE run_uuid = ?", (run_id,))
    return [column[0] for column in found.description], found.fetchall()


def _copy(row: Any, place: int, columns: list[str], index: int) -> list[Any]:
    cells = [*row]
    cells[place] = f"{index:032x}"
    if "is_nan" in columns:
        cells[columns.index("value")] *= random.Random(index).random()
    return cells


def _replay(directory: Path, folder: Path) -> None:
    """Track a past run again, and print the seconds of each kind of call."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    history = json.loads((directory / "history.json").read_text(encoding="utf-8"))
    duration = sum(stage["seconds"] for stage in manifest["stages"].values())
    spent: dict[str, float] = {}
    _start_elsewhere(spent, folder)
    tracker = MlflowTracker(TrackerConfig(system_metrics=False), folder)
    config = {"group": {f"key{number}": number for number in range(_PARAMS)}}
    with _timed(spent, "start"):
        tracker.start(RunInfo("replay", "replay", config, directory=folder))
    with _timed(spent, f"{len(history)} epochs"):
        for record in history:
            numbers = {name: value for name, value in record.items() if isinstance(value, float)}
            tracker.log(Metrics(numbers, step=round(100 * record["epoch"])))
    with _timed(spent, f"{len(manifest['stages'])} stages"):
        for stage in manifest["stages"].values():
            numbers = {name: v for name, v in stage["metrics"].items() if isinstance(v, float | int)}
            tracker.log(Metrics(numbers))
            tracker.log(Tags({"dataset.digest": "0" * 64}))
    with _timed(spent, "files"):
        for name in (name for name in _FILES if (directory / name).exists()):
            tracker.log(Artifact(directory / name))
    with _timed(spent, "finish"):
        tracker.finish("FINISHED")
    print(f"tracking {directory.name}, which took {duration:.0f} s   seconds   share of the run")
    for what, seconds in {**spent, "all": sum(spent.values())}.items():
        print(f"{what:52} {seconds:6.2f}   {seconds / duration:7.2%}")


def _start_elsewhere(spent: dict[str, float], folder: Path) -> None:
    """Measure the costs that only the first run of a process, or of a database, has."""
    code = "import time; t = time.time(); from mlflow import MlflowClient; print(time.time() - t)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    )
    spent["import of MLflow, once a process"] = float(done.stdout)
    tracker = MlflowTracker(TrackerConfig(system_metrics=False), folder)
    import_client()
    with _timed(spent, "new database, once a store"):
        tracker.start(RunInfo("first", "replay", {}, directory=folder))
    tracker.finish("FINISHED")


@contextmanager
def _timed(spent: dict[str, float], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    spent[what] = time.perf_counter() - started


def _options() -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=whole, default=1000)
    parser.add_argument("--metrics", type=whole, default=200, help="of each run, at least 3")
    parser.add_argument("--server", action="store_true", help="also ask an MLflow server over the database")
    parser.add_argument("--repeats", type=whole, default=3)
    parser.add_argument("--log", type=Path, metavar="RUN", help="directory of a run to track again")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
