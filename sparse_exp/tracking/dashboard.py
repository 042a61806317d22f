"""``make dashboard``: MLflow's UI over the runs of this directory, on a free port."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

DEFAULT_STORE = Path("outputs/mlflow")


def main() -> None:
    """Serve until Ctrl-C; prints the address. The first argument may name another store directory."""
    store = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_STORE
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(store / 'mlflow.db').absolute()}"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        sys.exit(f"Error: There are no runs in {store} yet. Make one with: make run")
    if uri.startswith("http"):
        sys.exit(f"The runs are on the server {uri}: open it in a browser.")
    port = free_port()
    address = f"http://127.0.0.1:{port}/{_page(uri)}"
    print(f"MLflow shows the runs in about half a minute on {address} (Ctrl-C ends it)")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    # One worker starts in half the time, and one person looks.
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {"PYTHONWARNINGS": "ignore", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # The server starts processes of its own, which it leaves behind when it is told to end: end its session.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        sys.exit(server.wait())
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _page(uri: str) -> str:
    """The page of the newest run's experiment; MLflow by itself opens one for language models."""
    if not uri.startswith("sqlite:///"):
        return ""
    newest = "SELECT experiment_id FROM runs ORDER BY start_time DESC LIMIT 1"
    with suppress(sqlite3.Error), closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection:
        for (experiment,) in connection.execute(newest):
            return f"#/experiments/{experiment}/runs?workflowType=machine_learning"
    return ""


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
