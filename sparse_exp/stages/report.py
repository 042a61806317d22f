"""Pictures, report and summary."""

from __future__ import annotations

from sparse_exp.stages.base import Context, Outcome
from sparse_exp.tracking import Artifact


def report(context: Context) -> Outcome:
    """Draw the pictures, write the report, and show the summary."""
    from sparse_exp.report.compose import compose_report
    from sparse_exp.report.console import show_summary

    pictures = compose_report(context)
    rows = context.facts("benchmark").get("rows", [])
    show_summary(dict(context.run.result()), context.experiment.name, context.run.path, rows)
    for folder in ("plots", "deployment"):
        context.tracker.log(Artifact(context.run.path / folder))
    return Outcome([*pictures, context.run.path / "report.md"])
