"""Directories land whole or not at all: what readers see, what stays after a failure or a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_exp import files
from sparse_exp.files import landing_directory, replaced_by


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def build(
    target: Path, text: str = "new", part: Path | None = None, error: type[BaseException] | None = None
) -> None:
    with landing_directory(target, part=part) as folder:
        assert part in (None, folder)
        assert content(folder) == {}
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text(text)
        if error:
            raise error


@pytest.fixture(params=["exchange", "two renames"])
def target(request, tmp_path, monkeypatch) -> Path:
    """A directory in a new one of its own, on a file system that can exchange two, or not."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return tmp_path / "new" / "target"


def test_it_is_there_only_when_it_is_whole(target):
    with landing_directory(target) as folder:
        (folder / "file").write_text("half")
        assert not target.exists()
        assert folder.stat().st_dev == target.parent.stat().st_dev  # else a rename would not be one step
        (folder / "file").write_text("whole")
    assert content(target) == {"file": "whole"}
    assert names(target.parent) == {"target"}


def test_it_replaces_what_was_there_whole(target):
    target.mkdir(parents=True)
    (target / "old").write_text("old")
    build(target)
    assert content(target) == {"inside/file": "new"}
    assert names(target.parent) == {"target"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("there_before", [False, True])
def test_what_fails_leaves_what_was_there(target, error, there_before):
    if there_before:
        build(target, "old")
    with pytest.raises(error):
        build(target, "half", error=error)
    assert names(target.parent) == ({"target"} if there_before else set())
    assert not there_before or content(target) == {"inside/file": "old"}


def test_a_directory_that_cannot_be_put_in_its_place_leaves_the_old_one(target, monkeypatch):
    build(target, "old")
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    replace = Path.replace

    def refuse(self: Path, other: Path) -> Path:
        if other == target and self != replaced_by(self.with_name(".target.partial")):
            raise OSError(5, "Input/output error")
        return replace(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            build(target)
    assert content(target) == {"inside/file": "old"}
    assert names(target.parent) == {"target"}


def test_it_may_be_built_elsewhere(target):
    part = target.parent.parent / ".part"
    with pytest.raises(ValueError):
        build(target, part=part, error=ValueError)
    assert not target.parent.exists()  # directories above it are made when it lands
    build(target, part=part)
    assert content(target) == {"inside/file": "new"}
    assert names(target.parent.parent) == {"new"}


KILLED = """
import os, signal, sys
from pathlib import Path
from sparse_exp.files import landing_directory
with landing_directory(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("there_before", [False, True])
def test_what_a_killed_process_left_is_cleared_by_the_next_one(tmp_path, there_before):
    target = tmp_path / "target"
    if there_before:
        build(target, "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert names(tmp_path) == {".target.partial"} | ({"target"} if there_before else set())
    assert not there_before or content(target) == {"inside/file": "old"}
    build(target)
    assert content(target) == {"inside/file": "new"}
    assert names(tmp_path) == {"target"}


def test_a_directory_whose_replacement_was_killed_between_two_renames_comes_back(tmp_path):
    target = tmp_path / "target"
    build(target, "old")
    target.replace(replaced_by(tmp_path / ".target.partial"))
    with pytest.raises(ValueError):
        build(target, error=ValueError)
    assert content(target) == {"inside/file": "old"}
    assert names(tmp_path) == {"target"}


def test_a_link_is_replaced_and_not_what_it_leads_to(target):
    elsewhere = target.parent.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    target.parent.mkdir()
    target.symlink_to(elsewhere)
    build(target)
    assert content(target) == {"inside/file": "new"}
    assert not target.is_symlink()
    assert content(elsewhere) == {"mine": "mine"}
    assert names(target.parent) == {"target"}


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        build(tmp_path / "target")
    finally:
        os.umask(before)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o750
