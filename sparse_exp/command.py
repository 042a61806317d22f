"""How the small commands beside the experiment (``python -m sparse_exp.zoo``, ``.data``) begin and end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from sparse_exp.errors import SparseExpError, expected


def whole(text: str) -> int:
    """A type of `argparse`: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(expected("it", "a whole number of at least 1", text, "Correct it."))
    return int(text)


def amount(text: str) -> float:
    """A type of `argparse`: a number of at least 0."""
    try:
        found = float(text)
    except ValueError:
        found = float("nan")
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(expected("it", "a number of at least 0", text, "Correct it."))
    return found


def run_command(command: Callable[[], int]) -> NoReturn:
    """Run a command and leave: with its exit code, or with one line for what went wrong.

    Args:
        command: returns the exit code.

    Raises:
        SystemExit: always; 1 after an error for users, 130 after Ctrl-C.
    """
    try:
        sys.exit(command())
    except SparseExpError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
