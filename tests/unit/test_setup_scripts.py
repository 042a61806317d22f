"""The scripts that make environments, with a Python that only writes down what is asked of it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
REQUIREMENT = "deepsparse==1.8.0"
# -: whether it will do; -m venv FOLDER; -m pip install ... REQUIREMENT, which takes a while and may fail.
PYTHON = """#!/bin/sh
if [ "$1" = - ]; then cat >/dev/null; exit 0; fi
echo "$2" >>"$LOG"
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit; fi
[ "$FAIL" ] && exit 7
sleep 0.3
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with that Python in it."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("DEEPSPARSE_PYTHON", str(python))
    monkeypatch.setenv("FAIL", "")
    return tmp_path


def start(place: Path, requirement: str = REQUIREMENT) -> subprocess.Popen[str]:
    command = ["sh", str(TOOLS / "setup-deepsparse.sh"), str(place / "env"), requirement]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def done(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=30)[0]
    return process.returncode, said


def asked(place: Path) -> list[str]:
    return (place / "log").read_text().split() if (place / "log").exists() else []


linux_x86_64 = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="DeepSparse is for Linux on x86-64"
)


@linux_x86_64
def test_it_is_made_once_and_anew_for_another_version(place):
    code, said = done(start(place))
    assert code == 0
    assert said.count("\n") == 1
    assert done(start(place)) == (0, "")
    assert asked(place) == ["venv", "pip"]
    assert done(start(place, "deepsparse==1.7.0"))[0] == 0
    assert asked(place) == ["venv", "pip"] * 2


@linux_x86_64
def test_what_was_interrupted_is_made_anew(place, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    assert done(start(place))[0] == 1
    (place / "env" / "half").touch()
    monkeypatch.setenv("FAIL", "")
    assert done(start(place))[0] == 0
    assert not (place / "env" / "half").exists()
    assert asked(place) == ["venv", "pip"] * 2


@linux_x86_64
@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock here")
def test_two_at_once_make_one(place):
    for process in [start(place), start(place)]:
        assert done(process)[0] == 0
    assert asked(place) == ["venv", "pip"]


def test_without_a_python_for_it_it_says_so_in_one_line(place, monkeypatch):
    monkeypatch.setenv("DEEPSPARSE_PYTHON", str(place / "none"))
    code, said = done(start(place))
    assert code == 0
    assert said.count("\n") == 1
    assert said.startswith("DeepSparse is left out: ")
    assert not (place / "env").exists()


def test_a_python_is_found_by_its_version_and_others_are_not_taken():
    def find(*words: str) -> tuple[int, str]:
        script = ["sh", str(TOOLS / "find-python.sh"), *words]
        found = subprocess.run(script, capture_output=True, text=True, check=False)
        return found.returncode, found.stdout.strip()

    own = "{}.{}".format(*sys.version_info)
    assert find(f"3.1 {own}", sys.executable) == (0, sys.executable)
    assert find("3.1 2.7", sys.executable) == (1, "")
    assert find(own, os.devnull)[0] != 0
    code, path = find(own)
    if code == 0:
        version = subprocess.check_output(
            [path, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], text=True
        )
        assert version.strip() == own


# A Python as above, but of an environment that `make` has made or found; what is broken in it says $1.
IN_VENV = """#!/bin/sh
echo "venv: $*" >>"$LOG"
case "$1 $2" in
"-c "*) [ "%(broken)s" = import ] && exit 1 ;;
"-m pip") [ "%(broken)s" = pip ] && exit 1 ;;
esac
exit 0
"""
SYSTEM = """#!/bin/sh
if [ "$1" = - ]; then cat >/dev/null; exit 0; fi
echo "system: $*" >>"$LOG"
mkdir -p "$4/bin" && rm -f "$4/bin/python" && cp "$GOOD_PYTHON" "$4/bin/python"
"""


def place_of_make(tmp_path: Path, good: str) -> tuple[list[str], dict[str, str]]:
    """The Makefile with those Pythons beside it: a command without its targets, and its variables."""
    root = TOOLS.parent
    shutil.copy(root / "Makefile", tmp_path)
    shutil.copytree(root / "tools", tmp_path / "tools")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    for name, text in (("system", SYSTEM), ("good", good)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {"LOG": str(tmp_path / "log"), "GOOD_PYTHON": str(tmp_path / "good")}
    return ["make", f"PYTHON={tmp_path / 'system'}"], {**os.environ, **variables}


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("flock") is None, reason="no make or flock")
@pytest.mark.parametrize("installed", [False, True])
def test_of_two_calls_at_once_one_installs(tmp_path, installed):
    slow = (IN_VENV % {"broken": ""}).replace("exit 0", 'case "$*" in *install*) sleep 0.3 ;; esac; exit 0')
    command, environment = place_of_make(tmp_path, slow)
    command += [".venv/.installed-dev"]
    if installed:  # and a file that it depends on is newer now
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
        later = (tmp_path / ".venv" / ".installed-dev").stat().st_mtime + 1
        os.utime(tmp_path / "pyproject.toml", (later, later))
        (tmp_path / "log").unlink()
        time.sleep(1.1)
    how = {"cwd": tmp_path, "env": environment, "text": True, "stdout": subprocess.PIPE}
    both = [subprocess.Popen(command, **how) for _ in range(2)]
    said = "".join(process.communicate(timeout=60)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    log = (tmp_path / "log").read_text()
    assert log.count("pip install") == 3  # pip itself, what runs, and the tools
    assert log.count("venv --clear") == (not installed)
    assert "waiting for it to end" in said


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("broken", ["missing", "dangling", "import", "pip", "good"])
@pytest.mark.parametrize("installed", [False, True])
def test_an_environment_that_is_broken_is_made_anew(tmp_path, broken, installed):
    command, environment = place_of_make(tmp_path, IN_VENV % {"broken": ""})
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    if broken == "dangling":
        python.symlink_to(tmp_path / "gone")
    elif broken != "missing":
        python.write_text(IN_VENV % {"broken": broken})
        python.chmod(0o755)
    if installed:
        (tmp_path / ".venv" / ".installed").touch()
    command += [".venv/.installed"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    anew = broken != "good" and not (installed and broken == "pip")  # which worked when it was installed
    assert (f"system: -m venv --clear {'.venv'}" in log) == anew
    assert ("pip install" in log) == (anew or not installed)
