from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress

import psutil
import pytest

from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import SparseExpError
from sparse_exp.files import write_text
from sparse_exp.tracking import RunInfo, create_tracker
from sparse_exp.tracking.dashboard import main

PATIENCE_S = 180  # a server of many modules, on a machine that may be busy


@pytest.mark.slow
def test_the_dashboard_serves_the_store_at_the_address_it_prints_and_leaves_nothing_behind(tmp_path):
    tracker = create_tracker(TrackerConfig(system_metrics=False), tmp_path / "store")
    tracker.start(RunInfo("a", "sparse_exp", {}, {}, tmp_path))
    tracker.finish("FINISHED")
    command = [sys.executable, "-u", "-m", "sparse_exp.tracking.dashboard", str(tmp_path / "store")]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        [address] = re.findall(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        assert "mlflow" in page(address).lower()
        started = psutil.Process(server.pid).children(recursive=True)
        assert started
        server.terminate()
        assert server.wait(60) == 128 + signal.SIGTERM
        assert psutil.wait_procs(started, timeout=10)[1] == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, 9)
        server.wait()


def page(address: str) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"nothing answered at {address}")


def test_a_store_without_runs_is_refused_in_one_line(tmp_path):
    command = [sys.executable, "-m", "sparse_exp.tracking.dashboard", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 1
    assert ended.stderr == f"Error: There are no runs in {tmp_path} yet. Make one with: make run\n"


def dashboard(*words: str) -> str:
    """What the command refuses."""
    with pytest.raises(SparseExpError) as raised:
        main(list(words))
    return str(raised.value)


def test_options_are_read_and_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").touch()
    assert "from 0 to 65535, but got '99999'" in dashboard("--port", "99999")
    assert dashboard(str(tmp_path), "--host", "none.invalid").startswith("Cannot listen on none.invalid: ")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert {"--host", "--port", "--uri", "--config-dir"} <= set(capsys.readouterr().out.split())
    assert main(["--uri", "http://ann:s3cret@there"]) == 1
    assert capsys.readouterr().out == "The runs are on the server http://***@there: open it in a browser.\n"


def test_the_store_is_found_by_the_layers_that_runs_go_by(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "mine/local/default.yaml", "# @package _global_\npaths: {output: elsewhere}\n")
    assert f"no runs in {tmp_path}/elsewhere/mlflow yet" in dashboard("--config-dir", "mine")
