"""Progress of long work: a rich bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10.0
_WORTH_A_LINE = 1.0  # seconds; what is over at once needs no line


class Bar(Protocol):
    """A running progress display."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Count ``amount`` more units done; ``note`` replaces the short text beside the bar."""

    def goto(self, completed: float, total: float | None = None) -> None:
        """Set the units done so far, and the total if it has become known."""


_running: list[str] = []


class _SilentBar:
    def advance(self, amount: float = 1.0, note: str = "") -> None:
        pass

    def goto(self, completed: float, total: float | None = None) -> None:
        pass


class _PlainBar:
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._note = 0.0, ""
        self._started = self._printed = time.monotonic()

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self._done, self._note = self._done + amount, note or self._note
        self._print_now_and_then()

    def goto(self, completed: float, total: float | None = None) -> None:
        self._done, self._total = completed, total or self._total
        self._print_now_and_then()

    def _print_now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            _log.info("%s", self._line())

    def _line(self) -> str:
        total = f"/{self._total:g}" if self._total else ""
        text = f"{self._description}: {self._done:g}{total} {self._unit}"
        return f"{text}, {self._note}" if self._note else text

    def finish(self) -> None:
        seconds = time.monotonic() - self._started
        if seconds >= _WORTH_A_LINE:
            _log.info("%s, %.1f s", self._line(), seconds)


@contextmanager
def progress(description: str, total: float | None = None, unit: str = "steps") -> Iterator[Bar]:
    """Show the progress of a piece of work while the ``with`` block runs.

    Args:
        description: what is being done, such as ``"Evaluating"``.
        total: units of work in all; None when it is not known.
        unit: name of the unit, plural.

    Yields:
        A bar to advance. Where standard error is no terminal, it logs a plain line every ten
        seconds and one at the end instead. Inside another ``progress`` it shows nothing.
    """
    if _running:
        yield _SilentBar()
        return
    _running.append(description)
    try:
        with _shown_bar(description, total, unit) as bar:
            yield bar
    finally:
        _running.clear()


@contextmanager
def _shown_bar(description: str, total: float | None, unit: str) -> Iterator[Bar]:
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with _RichBar(console, description, total, unit) as bar:
            yield bar
        return
    plain = _PlainBar(description, total, unit)
    yield plain
    plain.finish()


class _RichBar:
    def __init__(self, console: object, description: str, total: float | None, unit: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        counts = "{task.completed:g}/{task.total:g}" if total else "{task.completed:g}"
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn(f"{counts} {unit}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,  # type: ignore[arg-type]
        )
        self._task = self._progress.add_task(description, total=total, note="")

    def __enter__(self) -> _RichBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self._progress.update(self._task, advance=amount)
        if note:
            self._progress.update(self._task, note=note)

    def goto(self, completed: float, total: float | None = None) -> None:
        self._progress.update(self._task, completed=completed, total=total)
