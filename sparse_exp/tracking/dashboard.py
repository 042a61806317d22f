"""``make dashboard``: MLflow's UI over the runs of this machine."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from sparse_exp.command import Parser, run_command
from sparse_exp.config.places import SQLITE, add_place_options, chosen_places
from sparse_exp.errors import SparseExpError
from sparse_exp.redaction import without_secrets
from sparse_exp.tracking.store import tracking_uri


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; prints the address.

    Args:
        arguments: of the command line; None: those of this process.

    Returns:
        The exit code.

    Raises:
        SparseExpError: there are no runs, or nothing to serve.
    """
    options = _options(arguments)
    places = chosen_places(options)
    uri, _ = tracking_uri(places.tracker, places.mlflow)
    if uri.startswith("http"):
        print(f"The runs are on the server {without_secrets(uri)}: open it in a browser.")
        return 1
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        store = Path(uri.removeprefix(SQLITE)).parent
        raise SparseExpError(f"There are no runs in {store} yet. Make one with: make run")
    port = options.port or free_port(options.host)
    shown = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    address = f"http://{shown}:{port}/{_page(uri)}"
    print(f"MLflow shows the runs in about half a minute on {address} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui"]
    # One worker starts in half the time, and one person looks.
    command += ["--host", options.host, "--port", str(port), "--workers", "1"]
    environment = {"PYTHONWARNINGS": "ignore", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    environment["MLFLOW_BACKEND_STORE_URI"] = uri  # not on the command line, which all users of a host see
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # The server starts processes of its own, which it leaves behind when it is told to end: end its session.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return server.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m sparse_exp.tracking.dashboard",
        description="MLflow's UI over the runs that are tracked in a local store or a database.",
    )
    add = parser.add_argument
    add("store", metavar="DIR", nargs="?", help="local MLflow store (default: paths.mlflow)")
    add("--host", metavar="NAME", default="127.0.0.1", help="to listen on (%(default)s: this machine alone)")
    add("--port", metavar="N", type=_port, default=0, help="to listen on (default: a free one)")
    add_place_options(parser, "uri")
    return parser.parse_args(arguments)


def _port(text: str) -> int:
    """A type of `argparse`: a number of a TCP port, 0 for a free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 65535, but got {text!r}")
    return int(text)


def _page(uri: str) -> str:
    """The page of the newest run's experiment; MLflow by itself opens one for language models."""
    if not uri.startswith(SQLITE):
        return ""
    newest = "SELECT experiment_id FROM runs ORDER BY start_time DESC LIMIT 1"
    with suppress(sqlite3.Error), closing(sqlite3.connect(uri.removeprefix(SQLITE))) as connection:
        for (experiment,) in connection.execute(newest):
            return f"#/experiments/{experiment}/runs?workflowType=machine_learning"
    return ""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on at this moment.

    Raises:
        SparseExpError: the host is no name of this machine.
    """
    try:
        with closing(socket.create_server((host, 0))) as probe:
            port: int = probe.getsockname()[1]
            return port
    except OSError as error:
        do = "Give a name or an address of this machine with --host."
        raise SparseExpError(f"Cannot listen on {host}: {error.strerror}. {do}") from error


if __name__ == "__main__":
    run_command(main)
