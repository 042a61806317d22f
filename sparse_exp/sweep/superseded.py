"""Manifests of earlier jobs under another name, while ``sweep.rerun=all`` makes all jobs anew.

A job without a manifest counts as not made: it is neither kept, nor are its stages taken over. Its files stay
until it is made anew. When the sweep is closed, the jobs that were not made anew get their manifests back.
"""

from __future__ import annotations

from pathlib import Path

from sparse_exp.runs.directory import MANIFEST, locked

_SUPERSEDED = "superseded.json"


def supersede_jobs(sweep: Path) -> None:
    """Rename the manifests of all jobs of a sweep, so that they count as not made.

    Raises:
        ConfigError: a job is being worked on.
    """
    for manifest in sweep.glob(f"*/{MANIFEST}"):
        with locked(manifest.parent, wait=False):
            manifest.replace(manifest.with_name(_SUPERSEDED))


def restore_superseded(sweep: Path) -> None:
    """Undo `supersede_jobs` for the jobs that were not made anew."""
    for superseded in sweep.glob(f"*/{_SUPERSEDED}"):
        manifest = superseded.with_name(MANIFEST)
        if manifest.is_file():
            superseded.unlink()
        else:
            superseded.replace(manifest)


def superseded_manifest(job: Path) -> Path | None:
    """The renamed manifest in a job's directory; None where there is none."""
    path = job / _SUPERSEDED
    return path if path.is_file() else None
