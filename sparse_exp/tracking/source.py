"""Which code a run was made with."""

from __future__ import annotations

import getpass
import subprocess
from pathlib import Path

import sparse_exp

_PACKAGE = Path(sparse_exp.__file__).parent


def source_tags(package: Path = _PACKAGE) -> dict[str, str]:
    """Tags that name the code and its user: MLflow's own names, ``git.dirty`` and ``version``.

    MLflow looks for the commit beside the script that was started, which is not in a repository
    when the package is installed. Here it is that of the package; without one it is left out.

    Args:
        package: directory whose repository is meant.
    """
    tags = {
        "mlflow.source.name": "sparse_exp",
        "mlflow.source.type": "LOCAL",
        "version": sparse_exp.__version__,
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = "unknown"
    return tags | _git_tags(package)


def _git_tags(package: Path) -> dict[str, str]:
    # An installed package may lie inside the repository of something else, which does not track it.
    if not _git(package, "ls-files", "__init__.py"):
        return {}
    changes = _git(package, "status", "--porcelain")
    commit, branch = _git(package, "rev-parse", "HEAD"), _git(package, "rev-parse", "--abbrev-ref", "HEAD")
    if not commit or changes is None:
        return {}
    return {
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": branch or "",
        "git.dirty": str(bool(changes)).lower(),
    }


def _git(directory: Path, *arguments: str) -> str | None:
    """The output of a git command; None where it failed or git is not there."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
