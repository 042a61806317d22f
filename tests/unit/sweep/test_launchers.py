"""What is known of a launcher before the first job."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from types import SimpleNamespace

import pytest

from sparse_exp.config.schema import LauncherConfig, RayConfig
from sparse_exp.errors import ConfigError, MissingDependency
from sparse_exp.sweep import launchers
from sparse_exp.sweep.launchers import check_launcher, start_launcher


@pytest.fixture
def listening():
    """The port of somebody who answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_serial_runs_one_job_at_a_time():
    check_launcher(LauncherConfig("serial", 1), RayConfig())
    with pytest.raises(ConfigError, match=r"to be 1, but got 3\. .*launcher=joblib launcher\.jobs=3"):
        check_launcher(LauncherConfig("serial", 3), RayConfig())
    check_launcher(LauncherConfig("joblib", 3), RayConfig())


def test_a_cluster_must_answer(listening):
    for address in (f"127.0.0.1:{listening}", f"ray://localhost:{listening}", "auto", None):
        check_launcher(LauncherConfig("ray", 2), RayConfig(address))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ConfigError, match=f"No Ray cluster answers at ray.address={address} .*refused"):
            check_launcher(LauncherConfig("ray", 2), RayConfig(address))
        assert time.monotonic() - started < 10
    check_launcher(LauncherConfig("joblib", 2), RayConfig(address))  # does not use it


@pytest.mark.parametrize(
    "address", ["here", "host:port", "host:", ":80", "http://host:80", "host:99999", "a b"]
)
def test_what_is_no_address(address):
    with pytest.raises(ConfigError, match=r"Expected ray\.address to be HOST:PORT"):
        check_launcher(LauncherConfig("ray"), RayConfig(address))


def test_slurm_needs_its_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch"):
        check_launcher(LauncherConfig("slurm", 8), RayConfig())
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    check_launcher(LauncherConfig("slurm", 8), RayConfig())


@pytest.fixture
def ray(monkeypatch):
    """A stand-in for the library that keeps what it is called with, and what is to happen at the end."""
    calls: list = []
    at_end: list = []
    stand_in = SimpleNamespace(
        init=lambda *words, **settings: calls.append((words, settings)),
        shutdown=lambda: calls.append("shutdown"),
    )
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setattr(launchers.atexit, "register", lambda *call: at_end.append(call))
    monkeypatch.delenv("RAY_DEDUP_LOGS", raising=False)
    return SimpleNamespace(calls=calls, at_end=at_end, library=stand_in)


def test_a_ray_of_its_own_leaves_nothing(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(launchers.tempfile, "tempdir", str(tmp_path))
    start_launcher(LauncherConfig("ray", 3), RayConfig())
    [(words, settings)] = ray.calls
    assert words == (None,)
    assert (settings["num_cpus"], settings["include_dashboard"]) == (3, False)
    assert settings["logging_level"] == logging.ERROR
    assert os.path.isdir(settings["_temp_dir"])  # noqa: PTH112
    [(function, *arguments)] = ray.at_end
    function(*arguments)
    assert ray.calls[-1] == "shutdown"
    assert list(tmp_path.iterdir()) == []


def test_of_a_cluster_nothing_is_set_that_only_its_owner_may(ray):
    start_launcher(LauncherConfig("ray", 3), RayConfig("host:6379"))
    assert ray.calls == [(("host:6379",), {"logging_level": logging.ERROR})]


def test_a_cluster_that_refuses_is_told_in_one_line(ray):
    def refuse(*_, **__):
        raise RuntimeError("Version mismatch:\nmore")

    ray.library.init = refuse
    with pytest.raises(ConfigError, match="Ray cannot be used: Version mismatch") as caught:
        start_launcher(LauncherConfig("ray"), RayConfig("host:6379"))
    assert "\n" not in str(caught.value)


def test_ray_is_needed_by_its_launcher_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    start_launcher(LauncherConfig("joblib", 2), RayConfig())
    with pytest.raises(MissingDependency, match=r"sparse-exp\[ray\]"):
        start_launcher(LauncherConfig("ray", 2), RayConfig())
