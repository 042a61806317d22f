"""What earlier starts made of a sweep: set aside while all is made anew, put back where it is not."""

from __future__ import annotations

from pathlib import Path

from sparse_exp.runs.directory import MANIFEST, locked

_ASIDE = "superseded.json"


def set_aside(sweep: Path) -> None:
    """Let the jobs of a sweep count as not made: neither kept nor taken from, but still there.

    Raises:
        ConfigError: one of them is being worked on.
    """
    for manifest in sweep.glob(f"*/{MANIFEST}"):
        with locked(manifest.parent, wait=False):
            manifest.replace(manifest.with_name(_ASIDE))


def put_back(sweep: Path) -> None:
    """Undo `set_aside` for the jobs that were not made anew."""
    for aside in sweep.glob(f"*/{_ASIDE}"):
        manifest = aside.with_name(MANIFEST)
        if manifest.is_file():
            aside.unlink()
        else:
            aside.replace(manifest)


def aside_of(directory: Path) -> Path | None:
    """The manifest of a job's run directory that was set aside, if there is one."""
    return path if (path := directory / _ASIDE).is_file() else None
