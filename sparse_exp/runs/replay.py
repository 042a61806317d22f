"""What a tracker is told of a run, read from the run's manifest and files alone.

To tell it twice changes nothing: events carry the time at which they happened. So whatever a tracking server
missed is told again from here: when the run goes on or ends, or by ``python -m sparse_exp.tracking sync``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparse_exp.config.places import SQLITE
from sparse_exp.errors import ConfigError, SparseExpError, expected
from sparse_exp.files import parse_json
from sparse_exp.locks import is_held
from sparse_exp.redaction import without_secrets
from sparse_exp.runs.directory import CONFIG, LOCK, MANIFEST, Run, find_directories, locked
from sparse_exp.runs.kinds import finite, is_of
from sparse_exp.runs.past import DIED
from sparse_exp.tracking.delivery import Delivery, Sent
from sparse_exp.tracking.events import ENDED, Artifact, Event, Finish, Metrics, epoch_metrics, from_plain
from sparse_exp.tracking.messages import one_line
from sparse_exp.tracking.mlflow import RunWriter, connect, is_deleted

HISTORY = "history.json"
AT_THE_START = (CONFIG, "recipe.md", "environment.txt")
AT_THE_END = (
    "report.md",
    "report.html",
    "result.json",
    MANIFEST,
    HISTORY,
    "benchmark.json",
    "why.json",
    "sparse_exp.log",
)
_PATIENCE_S = 20.0
_EPOCH = {"epoch": finite, ENDED: finite}

Told = Iterator[tuple[Event, float]]


def told_of(run: Run) -> Told:
    """All that a run has to tell so far, but its end.

    Yields:
        Events, and when each happened, in seconds since 1970.
    """
    started = float(run.state.get("started", 0.0))
    yield from files_of(run, AT_THE_START, started)
    for stage in run.records:
        yield from told_of_stage(run, stage, epochs=True)
    if not any(HISTORY in record.outputs for record in run.records.values()):
        yield from _epochs(run, started)  # of a training that is not finished
    yield from files_of(run, AT_THE_END, float(run.state.get(ENDED) or started))


def told_of_stage(run: Run, stage: str, *, epochs: bool) -> Told:
    """The events of a finished stage.

    Args:
        run: its record of the stage is read.
        stage: name of the stage.
        epochs: with those of a training, one for each record of its history.

    Yields:
        Events, and when each happened, in seconds since 1970.
    """
    record = run.records[stage]
    if epochs and HISTORY in record.outputs:
        yield from _epochs(run, record.ended)
    for plain in record.events:
        try:
            event = from_plain(plain, run.path)
        except (KeyError, TypeError):  # of a later version
            continue
        yield event, record.ended
    numbers = {name: float(v) for name, v in record.metrics.items() if isinstance(v, float | int)}
    yield Metrics({**numbers, f"time/{stage}_s": record.seconds}, record.step), record.ended


def files_of(run: Run, names: Sequence[str], at: float) -> Told:
    """Those of some files of a run that are there, as artifacts."""
    for name in names:
        if (run.path / name).is_file():
            yield Artifact(run.path / name), at


def _epochs(run: Run, otherwise: float) -> Told:
    path = run.path / HISTORY
    try:
        history = parse_json(path.read_bytes()) if path.is_file() else ()
    except ValueError:
        return
    for record in history if is_of(history, [_EPOCH]) else ():
        if "epoch" in record:
            yield epoch_metrics(record), float(record.get(ENDED, otherwise))


def find_untold(directories: Sequence[Path]) -> list[Path]:
    """Directories of runs and sweeps, at or below some directories, that their tracker does not know all of.

    Copies of runs are left out: what they say is the original's to tell.

    Raises:
        ConfigError: one is no directory.
    """
    found: dict[Path, None] = {}
    for directory in directories:
        if not directory.is_dir():
            do = "Give the directory of a run, or one above it."
            raise ConfigError(expected("DIR", "a directory", str(directory), do))
        runs = [run for path in find_directories(directory) if (run := Run.find(path))]
        untold = [
            run
            for run in runs
            if run.state.get("told") is False and run.tracker_run_id is not None and not run.original
        ]
        found |= {directory / run.path.relative_to(directory.resolve()): None for run in untold}
    return list(found)


class Sync:
    """Tells trackers what they missed, each of the runs that it was meant to know.

    Args:
        uri: address of the store to send to; None: as each run says.
        local: address of the local store, where runs say that theirs is a file that is not there any more:
            it was moved together with them.
    """

    def __init__(self, uri: str | None = None, local: str | None = None) -> None:
        self._uri, self._local = uri, local
        self._clients: dict[str, Any] = {}

    def send(self, directory: Path) -> Sent:
        """Tell all of a run again, and its end.

        Args:
            directory: of the run.
        """
        if is_held(directory / LOCK):
            return Sent(0, 1, "the run is not over; it sends them itself")
        with locked(directory, wait=True):
            run = Run.read(directory)
            try:
                client = self._client(self._address(str(run.state.get("tracker_address", ""))))
            except Exception as error:
                return Sent(0, 1, one_line(error))
            if is_deleted(client, str(run.tracker_run_id)):
                run.update(told=True)
                return Sent(0, 0, "its run was deleted there")
            status: Any = run.state.get("status")
            end = Finish(status, str(run.state.get("failure") or ""))
            if status == "RUNNING":
                end = Finish("KILLED", DIED)
            delivery = Delivery(RunWriter(client, str(run.tracker_run_id)).send)
            told = [*told_of(run), (end, _ended(run))]
            sent = delivery.send_again(told, _PATIENCE_S)
            run.update(told=not sent.left)
            return sent

    def _address(self, recorded: str) -> str:
        """With user and password, which are not recorded, from the environment.

        Raises:
            SparseExpError: they are needed, and not there.
        """
        if self._uri:
            return self._uri
        environment = os.environ.get("MLFLOW_TRACKING_URI", "")
        if without_secrets(environment) == recorded:
            return environment
        if "://***@" in recorded:
            do = "Set MLFLOW_TRACKING_URI to it, or give it with --uri."
            raise SparseExpError(f"The address {recorded} needs a user and a password. {do}")
        if recorded.startswith(SQLITE) and not Path(recorded.removeprefix(SQLITE)).is_file():
            if self._local is None:
                do = "If it was moved, name it with --uri sqlite:///PATH/mlflow.db."
                raise SparseExpError(f"The store {recorded} is not there. {do}")
            return self._local
        return recorded

    def _client(self, uri: str) -> Any:
        """The client of a store, asked once whether it answers: many runs may wait for the same one."""
        if uri not in self._clients:
            try:
                self._clients[uri] = connect(uri)
            except Exception as error:
                self._clients[uri] = error
        if isinstance(self._clients[uri], Exception):
            raise self._clients[uri]
        return self._clients[uri]


def _ended(run: Run) -> float:
    """When a run ended; of one that was killed when its last stage did, or its manifest was written."""
    ended = [record.ended for record in run.records.values()]
    return float(run.state.get(ENDED) or max(ended, default=0.0) or (run.path / MANIFEST).stat().st_mtime)
