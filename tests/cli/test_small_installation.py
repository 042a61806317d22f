"""What only the whole installation can do, where a small one is."""

from __future__ import annotations

import os
import subprocess
import sys

WITHOUT = "import sys\nsys.modules['torch'] = None\n"


def test_a_command_that_needs_torch_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "sparse_exp", "dry_run=true"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": path, "SPARSE_EXP_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    do = "Run: pip install 'sparse-exp[train]'."
    assert last == f"Error: This needs the package torch, which is not installed. {do}"
