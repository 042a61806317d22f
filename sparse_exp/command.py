"""How the small commands beside the experiment (``python -m sparse_exp.zoo``, ``.data``) end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from sparse_exp.errors import SparseExpError


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
