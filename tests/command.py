"""The command line inside this process, where torch is imported already: a process takes seconds for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from sparse_exp import cli


@dataclass
class Ended:
    """How a command line ended: its exit code, the line it ended with, and all that was printed or logged."""

    code: int
    error: str
    output: str


@pytest.fixture
def command_line(monkeypatch, capsys):
    """A function that calls the command line, as ``sparse-exp WORDS``, and says how it ended."""

    def call(*words: str) -> Ended:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["sparse-exp", *words])
        code, error = 0, ""
        try:
            cli.main()
        except SystemExit as end:  # Python prints a text and exits with 1
            code, error = (end.code or 0, "") if isinstance(end.code, int | None) else (1, str(end.code))
        shown = capsys.readouterr()
        return Ended(code, error, shown.out + shown.err)

    return call
