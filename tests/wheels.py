"""The package as it is handed on: built, and installed without what it depends on, which is here already."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, timeout=300)


def build(folder: Path) -> None:
    """Put wheel and source distribution into a folder; what builds them is fetched from the package index."""
    pip("install", "--target", folder / "tools", "hatchling>=1.26")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(folder / "tools")}, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def install(file: Path, folder: Path) -> None:
    """Install a wheel or a source distribution, and nothing else, into a folder."""
    pip("install", "--no-deps", "--target", folder, file)


@pytest.fixture(scope="session")
def distributions(made_once) -> Path:
    """A folder with ``*.whl`` and ``*.tar.gz``."""
    return made_once("distributions", build)


@pytest.fixture(scope="session")
def installed(made_once, distributions) -> Path:
    """A folder with the wheel installed; ``bin/sparse-exp`` is its command."""
    (wheel,) = distributions.glob("*.whl")
    return made_once("installed", lambda folder: install(wheel, folder))
