"""How the small commands beside the experiment (``python -m sparse_exp.zoo``, ``.data``) begin and end."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from sparse_exp.errors import ConfigError, SparseExpError, for_users
from sparse_exp.redaction import redact_tracebacks, without_secrets


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an option as every error is said: in one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message[:1].upper()}{message[1:].rstrip('.')}. See --help.")


def whole(text: str) -> int:
    """A type of `argparse`: a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is none; likewise those below.
    """
    return int(checked(text, text.isdecimal() and int(text) >= 1, "a whole number of at least 1"))


def share(text: str) -> float:
    """A number between 0 and 1."""
    return number(text, lambda value: 0 <= value <= 1, "a number between 0 and 1")


def amount(text: str) -> float:
    """A number of at least 0."""
    return number(text, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def number(text: str, good: Callable[[float], bool], should_be: str) -> float:
    """A number with a condition.

    Args:
        text: as it was given.
        good: the condition; false of what is no number.
        should_be: the condition in words.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    checked(text, good(value), should_be)
    return value


def checked(text: str, good: bool, should_be: str) -> str:  # noqa: FBT001
    """The text, if it is good."""
    if not good:
        raise argparse.ArgumentTypeError(f"expected {should_be}, but got {text!r}")
    return text


def print_any_text() -> None:
    """Let names of files that the output's encoding does not have be printed, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_command(command: Callable[[], int]) -> NoReturn:
    """Run a command and leave: with its exit code, or with one line for what went wrong.

    Args:
        command: returns the exit code.

    Raises:
        SystemExit: always; 1 after an error for users, 130 after Ctrl-C.
    """
    print_any_text()
    redact_tracebacks()
    try:
        sys.exit(command())
    except SparseExpError as error:
        sys.exit(without_secrets(f"Error: {error}"))
    except ModuleNotFoundError as error:
        if (told := for_users(error)) is error:
            raise
        sys.exit(f"Error: {told}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
