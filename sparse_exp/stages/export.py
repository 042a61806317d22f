"""For each engine and variant of the target a file that suits it."""

from __future__ import annotations

from sparse_exp.files import sha256_of
from sparse_exp.stages.base import Context, Outcome


def export(context: Context) -> Outcome:
    """Write the deployment: for each engine and variant of the target a file that suits it."""
    from sparse_exp.export.deployment import export_run

    files, facts = export_run(context)
    return Outcome(files, facts={**facts, "checkpoint_sha256": sha256_of(context.checkpoint)})
