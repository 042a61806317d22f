"""Pictures, report and summary."""

from __future__ import annotations

from sparse_exp.report.console import show_summary
from sparse_exp.runs.deployment import FOLDER, Deployment
from sparse_exp.stages.base import Context, Outcome, Stage
from sparse_exp.tracking import Artifact, Event


def _run(context: Context) -> Outcome:
    from sparse_exp.report.compose import compose_report

    experiment, directory = context.experiment, context.run.path
    pictures = compose_report(
        experiment, context.run, context.dataset, cores=context.cores, mismatch=context.mismatch
    )
    rows = context.facts("benchmark").get("rows", [])
    show_summary(context.run.result(), experiment.name, directory, rows)
    exported = _exported(context.run.deployment, experiment.tracker.artifacts)
    pages = [directory / "report.md", directory / "report.html"]
    return Outcome([*pictures, *pages], events=[Artifact(directory / "plots"), *exported])


def _exported(deployment: Deployment, wanted: str) -> list[Event]:
    """The exported files that the tracker is to keep: ``all``, ``deployed`` or ``none``."""
    if wanted == "all":
        return [Artifact(deployment.folder)]
    return [Artifact(path, FOLDER) for path in deployment.deployed_files if wanted == "deployed"]


STAGE = Stage(name="report", run=_run, depends_on=("name",), takes_checkpoint=True)
