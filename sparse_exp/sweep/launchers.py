"""Check before the first job whether a launcher can run jobs from here, and start Ray where it is wanted."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sparse_exp.config.schema import LauncherConfig, RayConfig
from sparse_exp.errors import ConfigError, MissingDependency, expected, first_line

_log = logging.getLogger(__name__)
_CONNECT_S = 5.0
# HOST:PORT of the cluster's head, or ray://HOST:PORT of its client server.
_ADDRESS = re.compile(r"(ray://)?(?P<host>\[[^\]]+\]|[^:/\[\]]+):(?P<port>\d{1,5})")
_FOUND_BY_RAY = ("auto", "local")
# Jobs hand over no more than some text and numbers. By default Ray would take a third of the memory.
_OBJECT_STORE_BYTES = 100 << 20


# Hydra's own launchers, by the option that brings each with the settings of this project.
_OF_HYDRA = {"serial": "basic", "joblib": "joblib", "ray": "ray", "slurm": "submitit_slurm"}


def check_launcher(launcher: LauncherConfig, ray: RayConfig, of_hydra: str | None = None) -> None:
    """Refuse a launcher that cannot run jobs from here.

    Args:
        launcher: its name, and how many jobs it is to run at once.
        ray: the cluster of ``launcher=ray``.
        of_hydra: the choice of Hydra's own group ``hydra/launcher``, which ``launcher`` makes.

    Raises:
        ConfigError: another of Hydra's launchers was chosen than that of ``launcher``, whose jobs would not
            share the cores; the serial launcher is to run several jobs at once, no server answers at
            ``ray.address`` within 5 s, or Slurm is not on this machine.
    """
    if of_hydra is not None and of_hydra != _OF_HYDRA.get(launcher.name, of_hydra):
        ours = next((name for name, theirs in _OF_HYDRA.items() if theirs == of_hydra), None)
        do = f"Use launcher={ours} instead." if ours else f"Launchers are {', '.join(_OF_HYDRA)}."
        raise ConfigError(expected("hydra/launcher", f"that of launcher={launcher.name}", of_hydra, do))
    if launcher.name == "serial" and launcher.jobs > 1:
        do = f"To run several at once, add launcher=joblib launcher.jobs={launcher.jobs}."
        raise ConfigError(expected("launcher.jobs of launcher=serial", "1", launcher.jobs, do))
    if launcher.name == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "launcher=slurm needs Slurm's sbatch, which is not on the PATH of this machine. Start the sweep "
            "on a login node, or use launcher=joblib."
        )
    if launcher.name == "ray" and ray.address and ray.address not in _FOUND_BY_RAY:
        _check_ray(ray.address)


def _check_ray(address: str) -> None:
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        do = "Leave ray.address out to start Ray on this machine."
        raise ConfigError(expected("ray.address", "HOST:PORT or ray://HOST:PORT of a cluster", address, do))
    place = (match["host"].strip("[]"), int(match["port"]))
    try:
        socket.create_connection(place, timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"No Ray cluster answers at ray.address={address} ({error.strerror or error}). Start one there "
            "with ray start --head, or leave ray.address out to start Ray on this machine."
        ) from error


def slurm_jobs(sweep: Path) -> set[str]:
    """Numbers of the arrays of Slurm jobs that were ever submitted for a sweep, as submitit noted them."""
    return {path.name.partition("_")[0] for path in (sweep / ".submitit").glob("[0-9]*")}


def cancel_slurm_jobs(numbers: Collection[str]) -> None:
    """Let Slurm end jobs; they record that they were killed, and the same command goes on with them."""
    if not numbers:
        return
    _log.info("Cancelling the Slurm jobs %s.", ", ".join(sorted(numbers)))
    try:
        subprocess.run(["scancel", *sorted(numbers)], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("They go on, as scancel failed: %s", first_line(error))


def start_launcher(launcher: LauncherConfig, ray: RayConfig) -> None:
    """Start Ray for ``launcher=ray``, and end it with this process. Other launchers need no start.

    Without ``ray.address`` Ray runs on this machine alone, with ``launcher.jobs`` jobs at once. It leaves no
    files behind, unless this process is killed.

    Args:
        launcher: as `check_launcher` passed it.
        ray: the cluster of ``launcher=ray``.

    Raises:
        ConfigError: Ray cannot be started, or does not let this machine into the cluster.
        MissingDependency: Ray is not installed.
    """
    if launcher.name != "ray":
        return
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # show every line of every job
    try:
        import ray as library
    except ModuleNotFoundError as error:
        raise MissingDependency("launcher=ray needs Ray. Install: pip install 'sparse-exp[ray]'") from error
    scratch = None if ray.address else tempfile.mkdtemp(prefix="ray-")  # short: sockets lie below it
    own: dict[str, Any] = {
        "num_cpus": launcher.jobs,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_temp_dir": scratch,
    }
    atexit.register(_end_ray, library, scratch)
    try:
        library.init(ray.address, logging_level=logging.ERROR, **(own if scratch else {}))
    except Exception as error:  # Ray raises many kinds; on a busy machine Exception itself
        do = (
            "Start again when this machine is less busy" if scratch else "Look at the cluster with ray status"
        )
        raise ConfigError(f"Ray cannot be used: {first_line(error)} {do}, or use launcher=joblib.") from error


def _end_ray(library: Any, scratch: str | None) -> None:
    library.shutdown()
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
