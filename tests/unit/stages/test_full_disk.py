"""A disk that is full at the start of a run, while it records, or at its end; and signals that end it."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_exp import experiment as experiments
from sparse_exp import files
from sparse_exp.errors import StageFailed
from sparse_exp.runs.directory import Run
from sparse_exp.stages.registry import STAGES
from sparse_exp.tracking import NoTracker


class Told(NoTracker):
    """Keeps how the run ended."""

    end: tuple | None = None

    def finish(self, status, reason="", at=None) -> bool:
        Told.end = status, reason
        return True


@pytest.fixture(autouse=True)
def _tracker(monkeypatch) -> None:
    Told.end = None
    monkeypatch.setattr(experiments, "create_tracker", lambda *_: Told())


@pytest.fixture
def full(monkeypatch):
    """A function that lets no more files land whose name holds a text; ``None`` frees the disk."""
    said: list[str | None] = [None]

    def write_out(path: Path, real=files._write_out) -> None:
        if said[0] is not None and said[0] in path.name:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real(path)

    monkeypatch.setattr(files, "_write_out", write_out)

    def fill(text: str | None) -> None:
        said[0] = text

    return fill


@pytest.mark.parametrize(
    ("file", "where"),
    [("config.", "start of the run"), ("environment", "start of the run"), (".result.", "stage fetch")],
)
def test_a_full_disk_ends_the_run_in_one_line_and_everybody_knows(done, go, full, file, where):
    full(file)
    with pytest.raises(
        StageFailed, match=rf"The disk is full \({where}\)\. Free some space, then go on"
    ) as raised:
        go()
    assert "\n" not in str(raised.value)
    assert Told.end == ("FAILED", str(raised.value))
    run = Run.read(Path("run"))
    assert (run.status, run.state["failure"]) == ("FAILED", str(raised.value))
    full(None)
    go()
    assert Run.read(Path("run")).status == "FINISHED"


def test_where_not_even_the_end_can_be_written_the_tracker_is_told_all_the_same(done, go, full, monkeypatch):
    def fills(context, real=STAGES["plan"].run):
        full("manifest")
        return real(context)

    with monkeypatch.context() as patch:
        patch.setitem(STAGES, "plan", replace(STAGES["plan"], run=fills))
        with pytest.raises(StageFailed, match=r"The disk is full \(stage plan\)"):
            go()
    assert Told.end[0] == "FAILED"
    assert Run.read(Path("run")).status == "KILLED"  # nobody works on it
    full(None)
    assert go()["status"] == "FINISHED"


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"The disk is full \(stage plan\)\. Free some space",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/mnt/runs/best.pt"),
            r"/mnt/runs/best\.pt cannot be written \(stage plan\)\. Make it writable",
        ),
    ],
)
def test_the_cause_is_said_that_stands_behind_another_error(done, go, monkeypatch, cause, said):
    """torch's writer of archives raises errors of its own when a write fails."""

    def fails(context):
        try:
            raise cause
        except OSError:
            raise RuntimeError("unexpected pos 26256768 vs 26256656")  # noqa: B904

    monkeypatch.setitem(STAGES, "plan", replace(STAGES["plan"], run=fails))
    with pytest.raises(StageFailed, match=rf"^{said}, then go on with: python -m sparse_exp resume=\S+$"):
        go()


def test_a_killed_loader_of_images_is_said_in_one_line(done, go, monkeypatch):
    def fails(context):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.\nMore lines.")

    monkeypatch.setitem(STAGES, "plan", replace(STAGES["plan"], run=fails))
    with pytest.raises(StageFailed, match=r"^A process that loads images .* \(stage plan\)\. ") as raised:
        go()
    assert "dataset.workers=0" in str(raised.value)
    assert "resume=" in str(raised.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_as_ctrl_c_does(done, go, monkeypatch, number):
    def ended(context):
        os.kill(os.getpid(), number)
        return

    monkeypatch.setitem(STAGES, "plan", replace(STAGES["plan"], run=ended))
    before = signal.signal(number, signal.SIG_DFL)  # the tests may have been started with nohup
    try:
        with pytest.raises(KeyboardInterrupt):
            go()
    finally:
        signal.signal(number, before)
    assert Told.end == ("KILLED", "interrupted")
    assert Run.read(Path("run")).status == "KILLED"


def test_a_signal_that_is_ignored_stays_so(done, go, monkeypatch):
    def ended(context, real=STAGES["plan"].run):
        os.kill(os.getpid(), signal.SIGHUP)
        return real(context)

    monkeypatch.setitem(STAGES, "plan", replace(STAGES["plan"], run=ended))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert go()["status"] == "FINISHED"
    finally:
        signal.signal(signal.SIGHUP, before)
