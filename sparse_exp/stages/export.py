"""For each engine and variant of the target a file that suits it."""

from __future__ import annotations

from typing import Any

from sparse_exp.files import sha256_of
from sparse_exp.runs.deployment import wanted_files
from sparse_exp.stages.base import Context, Outcome, Stage


def _run(context: Context) -> Outcome:
    from sparse_exp.export.exporter import export_run

    files, facts = export_run(context.experiment, context.run, context.checkpoint, context.dataset)
    return Outcome(files, facts={**facts, "checkpoint_sha256": sha256_of(context.checkpoint)})


def _marks(context: Context) -> dict[str, Any]:
    """Which files are wanted, and the dense baseline that one of them is made from."""
    hardware, baseline = context.experiment.hardware, context.run.baseline_checkpoint
    wanted = wanted_files(hardware.engines, hardware.variants)
    return {"files": wanted, "dense": sha256_of(baseline) if baseline else None}


STAGE = Stage(
    name="export",
    run=_run,
    depends_on=("export",),
    marks=_marks,
    shared=lambda _: True,
    computes=True,
    takes_checkpoint=True,
    needs_checkpoint=True,
)
