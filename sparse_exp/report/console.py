"""Log the tables of results that a run ends with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_exp.report.summary import summary_text
from sparse_exp.text import console_width

_log = logging.getLogger(__name__)


def show_summary(
    result: dict[str, Any], title: str, directory: Path, rows: Sequence[dict[str, Any]] = ()
) -> None:
    """Log the tables of results, and the path of the report.

    Args:
        result: the flat numbers of ``result.json``.
        title: headline.
        directory: of the run.
        rows: of the benchmark.
    """
    _log.info("%s", summary_text(result, title, width=console_width(), rows=rows).rstrip())
    shown = directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory
    _log.info("Report: %s", shown / "report.html")
