"""``benchmarks/chaos.py`` in a short form: a few disturbances, of which nothing may be lost."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from scripts import BENCHMARKS

from sparse_exp.files import read_json

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kinds", [["run"], ["cache", "bit"]])
def test_a_few_disturbances_lose_nothing(tmp_path, kinds):
    words = ["--seed", "3", "--times", "1", "--json", "told.json", "--keep", "kept", "--only", *kinds]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "chaos.py"), *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (attempt,) = read_json(tmp_path / "told.json")["attempts"]
    assert attempt["disturbances"]
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {"undisturbed-run", "undisturbed-run.console"}
