"""The command ``python -m sparse_exp.tracking``: send what a tracking server did not take at the time."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from sparse_exp.command import Parser, run_command
from sparse_exp.config.schema import DEFAULT_DIRECTORIES
from sparse_exp.files import expanded
from sparse_exp.runs.replay import Sync, find_untold


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None: those of this process.

    Returns:
        The exit code: 1 where something could not be sent.

    Raises:
        SparseExpError: what the user can put right, one line.
    """
    logging.basicConfig(format="%(message)s", level=logging.ERROR)  # each run gets a line of its own anyway
    options = _parser().parse_args(arguments)
    given = [expanded(name) for name in options.directories]
    untold = find_untold(given or [path for path in DEFAULT_DIRECTORIES if path.is_dir()])
    if not untold:
        print("No events wait to be sent.")
        return 0
    sync, sent, left = Sync(options.uri), 0, 0
    for directory in untold:
        found = sync.send(directory)
        why = f", {found.left} left: {found.reason}" if found.left else ""
        print(f"{directory}: {_count(found.sent)} sent{why}.", flush=True)
        sent, left = sent + found.sent, left + found.left
    print(f"{len(untold)} run{'' if len(untold) == 1 else 's'}: {_count(sent)} sent, {left} left.")
    return 1 if left else 0


def _count(number: int) -> str:
    return f"{number} event{'' if number == 1 else 's'}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparse_exp.tracking", description="Runs and the store that they are tracked in."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    what = "send what a tracking server did not take while it was down"
    sync = commands.add_parser("sync", help=what, description=f"{what.capitalize()}.")
    here = " and ".join(map(str, DEFAULT_DIRECTORIES))
    add = sync.add_argument
    add("directories", metavar="DIR", nargs="*", help=f"runs, and all runs below (default: {here})")
    add("--uri", help="send to this store, which must know the runs (default: the one each was meant for)")
    return parser


if __name__ == "__main__":
    run_command(main)
