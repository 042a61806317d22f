"""The plan on the console and in the log."""

from __future__ import annotations

import logging

from sparse_exp.planning.plan import Plan, render
from sparse_exp.text import console_width

_log = logging.getLogger(__name__)


def show_plan(plan: Plan) -> None:
    """Log the plan: on the console and in the run's log alike."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=console_width(), color_system=None, legacy_windows=False)
    for part in render(plan):
        console.print(part)
    _log.info("%s", console.file.getvalue().rstrip())  # type: ignore[attr-defined]
