"""The command ``python -m sparse_exp.tracking``: what a store of runs lacks, and what is wrong with it."""

from __future__ import annotations

import argparse
import logging
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

from sparse_exp.command import Parser, run_command
from sparse_exp.config.places import Places, add_place_options, chosen_places
from sparse_exp.errors import SparseExpError
from sparse_exp.files import expanded, read_json
from sparse_exp.locks import is_held
from sparse_exp.runs.directory import LOCK, Run
from sparse_exp.runs.past import DIED, has_died, is_of_this_host
from sparse_exp.runs.replay import Sync, find_untold, told_of
from sparse_exp.tracking import FoundRun, end_open_runs
from sparse_exp.tracking.delivery import is_gone
from sparse_exp.tracking.relocation import ARTIFACTS, moved_from, relocate
from sparse_exp.tracking.store import LOCAL, ready_database, tracking_uri, unusable

_SWEEP = "sweep.json"  # in the directory of a sweep, which is the parent of its jobs in the tracker


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None: those of this process.

    Returns:
        The exit code: 1 where something could not be sent, or is wrong.

    Raises:
        SparseExpError: what the user can put right, one line.
    """
    logging.basicConfig(format="%(message)s", level=logging.ERROR)  # each run gets a line of its own anyway
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _sync(options: argparse.Namespace) -> int:
    given, places = [expanded(name) for name in options.directories], chosen_places(options)
    untold = find_untold(given or _there(places))
    if not untold:
        print("No events wait to be sent.")
        return 0
    if local := _local_store(places):  # artifacts are sent to where the store is now
        _relocate(places, local)
    sync, sent, left = Sync(options.uri, local), 0, 0
    for directory in untold:
        found = sync.send(directory)
        why = f", {found.left} left: {found.reason}" if found.left else ""
        gone = f", {found.gone} dropped, as their files are gone" if found.gone else ""
        deleted = f" ({found.reason})" if found.reason and not found.left else ""
        print(f"{directory}: {_count(found.sent)} sent{deleted}{gone}{why}.", flush=True)
        sent, left = sent + found.sent, left + found.left
    print(f"{len(untold)} run{'' if len(untold) == 1 else 's'}: {_count(sent)} sent, {left} left.")
    return 1 if left else 0


def _count(number: int) -> str:
    return f"{number} event{'' if number == 1 else 's'}"


def _there(places: Places) -> list[Path]:
    return [path for path in places.runs if path.is_dir()]


def _local_store(places: Places) -> str | None:
    """The address of the local store's database; None where there is none."""
    uri, named_by = tracking_uri(places.tracker, places.mlflow)
    return uri if named_by == LOCAL and (places.mlflow / "mlflow.db").is_file() else None


def _relocate(places: Places, uri: str) -> None:
    try:
        with ready_database(uri):
            relocate(places.mlflow)
    except (sqlite3.Error, OSError) as error:  # no database, on a full disk, or one that cannot be written
        raise SparseExpError(unusable(uri, LOCAL, error)) from error


def _doctor(options: argparse.Namespace) -> int:
    """Say what is wrong, and with ``--fix`` mend it."""
    places, fix = chosen_places(options), bool(options.fix)
    found = _moved(places, fix=fix) + _dead(places, fix=fix) + _untold(places, fix=fix)
    if not found:
        print("Nothing is wrong.")
        return 0
    print(f"{found} found{' and mended' if fix else '; --fix mends them'}.")
    return 0 if fix else 1


def _moved(places: Places, *, fix: bool) -> int:
    """How many directories of artifacts the store names where they are no more."""
    uri, named_by = tracking_uri(places.tracker, places.mlflow)
    former = moved_from(places.mlflow) if named_by == LOCAL else []
    for address in former:
        print(
            f"The store was moved: artifacts are to be in {address}, and are in {places.mlflow / ARTIFACTS}."
        )
    if fix and former:
        _relocate(places, uri)
    return len(former)


def _dead(places: Places, *, fix: bool) -> int:
    """How many runs say RUNNING whose process is gone."""
    found: list[FoundRun] = []

    def died(run: FoundRun) -> bool:
        if has_died(run) or _sweep_has_died(run):
            found.append(run)
        return fix and run in found

    if tracking_uri(places.tracker, places.mlflow)[1] == LOCAL and not _local_store(places):
        return 0
    end_open_runs(places.tracker, places.mlflow, None, died, "KILLED", DIED)
    for run in found:
        print(f"{run.name or run.run_id} says RUNNING, and {DIED}: {run.tags['run.directory']}")
    return len(found)


def _sweep_has_died(run: FoundRun) -> bool:
    """Whether a run is that of a sweep which nobody runs, nor one of its jobs."""
    sweep = Path(run.tags.get("run.directory", "/nowhere"))
    known = read_json(sweep / _SWEEP).get("parent") == run.run_id or is_of_this_host(run)
    if not (sweep / _SWEEP).is_file() or not known or is_held(sweep / LOCK):
        return False
    jobs = (Run.find(path) for path in sweep.iterdir())
    return not any(job is not None and job.status == "RUNNING" for job in jobs)


def _untold(places: Places, *, fix: bool) -> int:
    """How many runs their tracker does not know all of."""
    untold = find_untold(_there(places))
    for directory in untold:
        gone = sum(is_gone(event) for event, _ in told_of(Run.read(directory)))
        files = f", of which {gone} can never be, as their files are gone" if gone else ""
        print(f"Not all events of {directory} were sent{files}.")
        if fix:
            sent = Sync(local=_local_store(places)).send(directory)
            if sent.left:
                print(f"  {sent.left} are left: {sent.reason}.")
    return len(untold)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparse_exp.tracking", description="Runs and the store that they are tracked in."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    what = "send what a tracking server did not take while it was down"
    sync = commands.add_parser("sync", help=what, description=f"{what.capitalize()}.")
    sync.set_defaults(run=_sync)
    add = sync.add_argument
    add("directories", metavar="DIR", nargs="*", help="runs, and all runs below (default: all outputs)")
    add("--uri", help="send to this store, which must know the runs (default: the one each was meant for)")
    add_place_options(sync)
    what = "find runs that say RUNNING and are dead, artifacts of a moved store, events that were not sent"
    doctor = commands.add_parser("doctor", help=what, description=f"{what.capitalize()}.")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--fix", action="store_true", help="mend them")
    add_place_options(doctor, "uri", "store")
    return parser


if __name__ == "__main__":
    run_command(main)
