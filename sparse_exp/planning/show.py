"""The plan on the console and in the log."""

from __future__ import annotations

import logging

from sparse_exp.planning.plan import Plan, render
from sparse_exp.text import console_width, plain_text

_log = logging.getLogger(__name__)


def show_plan(plan: Plan) -> None:
    """Log the plan: on the console and in the run's log alike."""
    _log.info("%s", plain_text(*render(plan), width=console_width()).rstrip())
