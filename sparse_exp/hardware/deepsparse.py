"""Where DeepSparse is: in an environment of its own, or in this one.

DeepSparse 1.8 (2024, the last) needs NumPy 1 and Python 3.8 to 3.11, so ``make setup`` gives it an
environment of its own, ``.venv-deepsparse``. An interpreter that has it is looked for in this order:

1. ``hardware.deepsparse_python``, or the environment variable ``SPARSE_EXP_DEEPSPARSE_PYTHON``;
2. this interpreter, which has it where the extra ``neuralmagic`` is installed;
3. ``.venv-deepsparse`` in the checkout that this package lies in, else beside this interpreter's environment.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from sparse_exp.config.runtimes import RUNTIMES
from sparse_exp.errors import MissingDependency, expected
from sparse_exp.files import expanded

KEY, VARIABLE, FOLDER = "hardware.deepsparse_python", "SPARSE_EXP_DEEPSPARSE_PYTHON", ".venv-deepsparse"
_CHECKOUT = Path(__file__).parents[2]
_ASK = "import numpy; from importlib.metadata import version; print(version('deepsparse'))"
_TIMEOUT_S = 60


@dataclass(frozen=True)
class DeepSparse:
    """DeepSparse on this machine.

    Attributes:
        python: interpreter that has it; None where there is none.
        version: of DeepSparse; empty without one.
        problem: why it cannot be used, a few words; empty where it can.
        do: how to get it, a sentence; empty likewise.
        wrong: it is there, or named, and cannot be used: no mere absence.
    """

    python: Path | None = None
    version: str = ""
    problem: str = ""
    do: str = ""
    wrong: bool = False

    @property
    def line(self) -> str:
        """What is missing and how to get it, in one line."""
        return f"deepsparse: {self.problem}. {self.do}"


def find_deepsparse(named: str | None = None) -> DeepSparse:
    """Look for an interpreter that has DeepSparse.

    Args:
        named: the value of ``hardware.deepsparse_python``; None: it is not set.
    """
    named = named or os.environ.get(VARIABLE)
    if named:
        return _of(expanded(named), f"Correct {KEY}, or remove it.")
    if find_spec("deepsparse"):
        return _of(Path(sys.executable), _install())
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return DeepSparse(problem="exists for Linux on x86-64 only", do="The other engines run without it.")
    for folder in (_CHECKOUT / FOLDER, Path(sys.prefix).parent / FOLDER):
        if folder.is_dir():
            return _of(folder / "bin" / "python", f"Remove {folder}. {_install()}")
    return DeepSparse(problem="not installed", do=_install())


def require_python(named: str | None = None) -> Path:
    """The interpreter that has DeepSparse.

    Args:
        named: see `find_deepsparse`.

    Raises:
        MissingDependency: there is none; says why and what to do.
    """
    found = find_deepsparse(named)
    if found.python is None:
        raise MissingDependency(expected("deepsparse", "installed", found.problem, found.do))
    return found.python


@contextmanager
def using(named: str | None) -> Iterator[None]:
    """Let engines of this process and of its children take the interpreter that is named, in the block."""
    before = os.environ.get(VARIABLE)
    if named:
        os.environ[VARIABLE] = str(expanded(named).absolute())
    try:
        yield
    finally:
        if named and before is None:
            del os.environ[VARIABLE]
        elif before is not None:
            os.environ[VARIABLE] = before


def _install() -> str:
    if (_CHECKOUT / "Makefile").is_file():
        return "Run: make setup, which needs Python 3.8 to 3.11 for it."
    folder, requirement = Path(sys.prefix).parent / FOLDER, RUNTIMES["deepsparse"].requirement
    return f"With Python 3.8 to 3.11: python3.11 -m venv {folder} && {folder}/bin/pip install {requirement}."


def _of(python: Path, do: str) -> DeepSparse:
    if not (python.is_file() and os.access(python, os.X_OK)):
        return DeepSparse(problem=f"{python} is no program", do=do, wrong=True)
    version, problem = _asked(python)
    if problem:
        return DeepSparse(problem=f"{python} cannot be used: {problem}", do=do, wrong=True)
    return DeepSparse(python, version)


@cache
def _asked(python: Path) -> tuple[str, str]:
    """The version of DeepSparse that an interpreter has, and why it has none."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", _ASK], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return "", str(error).rstrip(".")
    said = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["it says nothing"]
    return ("", said[-1].rstrip(".")) if done.returncode else (said[-1], "")
