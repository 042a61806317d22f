"""What a run prints besides its log: the plan and the summary."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_exp.plan import Plan, render
from sparse_exp.report.summary import summary_text

_log = logging.getLogger(__name__)


def show_plan(plan: Plan) -> None:
    """Log the plan: on the console and in the run's log alike."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=_width(), color_system=None, legacy_windows=False)
    for part in render(plan):
        console.print(part)
    _log.info("%s", console.file.getvalue().rstrip())  # type: ignore[attr-defined]


def show_summary(
    result: dict[str, Any], title: str, directory: Path, rows: Sequence[dict[str, Any]] = ()
) -> None:
    """Log the table of results, with the rows of the benchmark, and where everything lies."""
    _log.info("%s", summary_text(result, title, width=_width(), rows=rows).rstrip())
    shown = directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory
    _log.info("Report: %s", shown / "report.md")


def _width() -> int:
    return min(110, max(80, shutil.get_terminal_size((100, 24)).columns))
