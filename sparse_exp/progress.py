"""Progress of long work: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_WORTH_A_LINE = 1.0  # shorter work gets no line at its end


class Bar(Protocol):
    """A running progress display."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Count ``amount`` more units done; ``note`` replaces the short text beside the bar."""

    def goto(self, completed: float, total: float | None = None) -> None:
        """Set the units done so far, and the total if it has become known."""


_running: list[str] = []  # the description of the work whose progress is shown now, if there is any


class _SilentBar:
    def advance(self, amount: float = 1.0, note: str = "") -> None:
        pass

    def goto(self, completed: float, total: float | None = None) -> None:
        pass


class _PlainBar:
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._note = 0.0, ""
        self._started = self._logged = time.monotonic()

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self._done, self._note = self._done + amount, note or self._note
        self._log_if_due()

    def goto(self, completed: float, total: float | None = None) -> None:
        self._done, self._total = completed, total or self._total
        self._log_if_due()

    def _log_if_due(self) -> None:
        now = time.monotonic()
        if now - self._logged >= _SECONDS_BETWEEN_LINES:
            self._logged = now
            _log.info("%s", self._line())

    def _line(self) -> str:
        total = f"/{self._total:g}" if self._total else ""
        text = f"{self._description}: {self._done:g}{total} {self._unit}"
        return f"{text}, {self._note}" if self._note else text

    def finish(self) -> None:
        seconds = time.monotonic() - self._started
        if seconds >= _SECONDS_WORTH_A_LINE:
            _log.info("%s, %.1f s", self._line(), seconds)


@contextmanager
def progress(description: str, total: float | None = None, unit: str = "steps") -> Iterator[Bar]:
    """Show the progress of a piece of work while the ``with`` block runs.

    Args:
        description: what is being done, such as ``"Evaluating"``.
        total: units of work in all; None when it is not known.
        unit: name of the unit, plural.

    Yields:
        The bar to advance. Where standard error is no terminal, it logs a plain line every ten
        seconds and one at the end. Inside another ``progress`` it shows nothing.
    """
    if _running:
        yield _SilentBar()
        return
    _running.append(description)
    console = Console(stderr=True)
    try:
        if console.is_terminal:
            with _RichBar(console, description, total, unit) as bar:
                yield bar
        else:
            plain = _PlainBar(description, total, unit)
            yield plain
            plain.finish()
    finally:
        _running.clear()


class _RichBar:
    def __init__(self, console: Console, description: str, total: float | None, unit: str) -> None:
        counts = "{task.completed:g}/{task.total:g}" if total else "{task.completed:g}"
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn(f"{counts} {unit}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
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
