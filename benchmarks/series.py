"""What scripts share that make many runs: overrides among their words, and a run in a process."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command line, and its words of the form KEY=VALUE, which are overrides of every run.

    These are taken out first: argparse would read those behind a list as parts of it.
    """
    overrides = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    return parser.parse_args([word for word in sys.argv[1:] if word not in overrides]), overrides


def make_run(directory: Path, words: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Make a run in a process of its own, anew if it is there; its output goes into `log_of`.

    Args:
        directory: of the run.
        words: its overrides.
        environment: variables that it gets beside those of this process.

    Returns:
        Its exit code.
    """
    log = log_of(directory)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "sparse_exp", f"paths.run={directory}", "overwrite=true", *words]
    variables = {**os.environ, **(environment or {})}
    with log.open("w", encoding="utf-8") as output:
        return subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, check=False
        ).returncode


def log_of(directory: Path) -> Path:
    """The file beside a run's directory that takes what the run puts out."""
    return directory.with_name(f"{directory.name}.log")
