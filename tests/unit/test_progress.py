from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest

import sparse_exp.progress as module
from sparse_exp.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it, and no terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="sparse_exp.progress")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_plain_line_every_ten_seconds_and_one_at_the_end(clock, lines, capsys):
    with progress("Training", 40, "steps") as bar:
        for _ in range(30):
            clock.now += 1
            bar.advance()
    assert lines() == [
        "Training: 10/40 steps",
        "Training: 20/40 steps",
        "Training: 30/40 steps",
        "Training: 30/40 steps, 30.0 s",
    ]
    assert capsys.readouterr().err == ""


def test_what_is_over_at_once_needs_no_line(clock, lines):
    with progress("Reading", 2) as bar:
        bar.advance(2)
    assert lines() == []


def test_notes_stay_until_the_next(clock, lines):
    with progress("Training", 3, "epochs") as bar:
        for note in ("mAP50 0.1", "", "mAP50 0.2"):
            clock.now += 11
            bar.advance(note=note)
    assert lines() == [
        "Training: 1/3 epochs, mAP50 0.1",
        "Training: 2/3 epochs, mAP50 0.1",
        "Training: 3/3 epochs, mAP50 0.2",
        "Training: 3/3 epochs, mAP50 0.2, 33.0 s",
    ]


def test_goto_sets_what_is_done_and_a_total_that_becomes_known(clock, lines):
    with progress("Downloading", unit="MB") as bar:
        clock.now += 11
        bar.goto(2.5)
        clock.now += 11
        bar.goto(5, total=94)
        clock.now += 11
        bar.goto(6)
    assert lines()[:3] == ["Downloading: 2.5 MB", "Downloading: 5/94 MB", "Downloading: 6/94 MB"]


def test_progress_inside_progress_is_silent_and_does_not_end_the_outer(clock, lines):
    with progress("Training", 2) as outer:
        for _ in range(2):
            with progress("Evaluating", 5) as inner:
                clock.now += 60
                inner.advance(5, note="inner")
                inner.goto(5, total=6)
        outer.advance(2)
    assert lines() == ["Training: 2/2 steps", "Training: 2/2 steps, 120.0 s"]


def test_after_an_error_progress_shows_again_and_the_error_passes(clock, lines):
    with pytest.raises(ValueError, match="broken"), progress("Training"):
        raise ValueError("broken")
    with progress("Exporting", 1, "files") as bar:
        clock.now += 2
        bar.advance()
    assert lines() == ["Exporting: 1/1 files, 2.0 s"]


def test_on_a_terminal_a_bar_is_drawn_and_nothing_is_logged(clock, lines, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with progress("Training", 4, "steps") as bar:
        bar.advance(2, note="mAP50 0.1")
        bar.advance()
        bar.goto(4)
    shown = terminal.getvalue()
    assert "Training" in shown
    assert "4/4 steps" in shown
    assert "mAP50 0.1" in shown
    assert lines() == []
