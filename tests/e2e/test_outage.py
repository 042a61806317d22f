"""A tracking server that dies in the middle of a run: the run ends well, and all of it arrives later."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from stores import known

from sparse_exp.runs.directory import Run
from sparse_exp.tracking.dashboard import free_port

pytestmark = pytest.mark.slow
SMALL = [
    "experiment=smoke", "recipe.variables.num_epochs=2", "hardware.engines=[onnxruntime]",
    "hardware.warmup_s=0", "hardware.repeats=1", "tracker.system_metrics=false",
    "tracker.register=digits", "tracker.alias=candidate",
]  # fmt: skip


class Server:
    """A real tracking server that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/db",
            "--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port),
            "--workers", "1",
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.5)
        pytest.fail("the server does not start")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def popen(cwd: Path, cache: Path, *words: str) -> subprocess.Popen:
    environment = {**os.environ, "SPARSE_EXP_CACHE": str(cache)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_all_of_a_run_arrives_after_an_outage_as_if_there_had_been_none(server, tmp_path):
    from mlflow import MlflowClient

    cache, words = tmp_path / "cache", ["sparse_exp", *SMALL, f"tracker.uri={server.uri}"]
    undisturbed = popen(tmp_path, cache, *words, "paths.run=first")
    output, _ = undisturbed.communicate(timeout=500)
    assert undisturbed.returncode == 0, output

    disturbed = popen(tmp_path, cache, *words, "paths.run=second")
    lines = iter(disturbed.stdout.readline, "")
    assert any(line.startswith("epoch 1 ") for line in lines)
    server.kill()
    rest = "".join(lines)
    assert disturbed.wait(timeout=500) == 0, rest
    assert "python -m sparse_exp.tracking sync" in rest
    ended = (tmp_path / "second" / "result.json").stat().st_mtime
    assert Run.read(tmp_path / "second").state["told"] is False

    still_down = popen(tmp_path, cache, "sparse_exp.tracking", "sync", "second")
    output, _ = still_down.communicate(timeout=100)
    assert (still_down.returncode, len(output.splitlines())) == (1, 2), output
    server.start()
    sync = popen(tmp_path, cache, "sparse_exp.tracking", "sync", "second")
    output, _ = sync.communicate(timeout=200)
    assert sync.returncode == 0, output
    assert Run.read(tmp_path / "second").state["told"] is True

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("sparse_exp")
    runs = {run.data.tags["run.directory"]: run for run in client.search_runs([experiment.experiment_id])}
    first, second = (runs[str(tmp_path / name)] for name in ("first", "second"))
    assert known(client, second.info.run_id) == known(client, first.info.run_id)
    assert abs(second.info.end_time / 1000 - ended) < 60
    versions = client.search_model_versions("name = 'digits'")
    assert {version.run_id for version in versions} == {first.info.run_id, second.info.run_id}
    assert client.get_model_version_by_alias("digits", "candidate").run_id == second.info.run_id


@pytest.mark.parametrize("answers", [False, True])
def test_a_server_that_is_down_at_the_start_is_one_line(tmp_path, answers):
    """Nothing listens there, or something does and never answers."""
    import socket

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        if answers:
            deaf.listen(50)
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        words = ["sparse_exp", *SMALL, f"tracker.uri={address}", "paths.run=run"]
        process = popen(tmp_path, tmp_path / "cache", *words)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, output
    assert address in errors[0]
    assert "Traceback" not in output
