"""What the run will do, and what cannot end well."""

from __future__ import annotations

from sparse_exp.stages.base import Context, Outcome
from sparse_exp.tracking import Tags


def plan(context: Context) -> Outcome:
    """Say what will happen, and refuse what cannot end well."""
    if "train" not in context.experiment.stages:
        return Outcome()
    from sparse_exp.planning.plan import with_mismatch
    from sparse_exp.planning.preflight import lay_out
    from sparse_exp.planning.show import show_plan

    laid_out, start = lay_out(
        context.experiment, context.recipe, context.dataset, context.precision, context.cache
    )
    laid_out = with_mismatch(laid_out, context.experiment.hardware.name, context.mismatch)
    show_plan(laid_out)
    transfer = f"{start.report.taken} of {start.report.total} tensors" if start.report else "none"
    found = {"sparsity": laid_out.start.sparsity, "quantized": laid_out.start.quantized}
    return Outcome(facts={**laid_out.as_facts(), "transferred": transfer, "start": found})


def _announce_plan(context: Context) -> None:
    facts = context.facts("plan")
    if facts and context.facts("fetch").get("sha256"):  # a start from random weights has none
        tags = {"taken": facts["transferred"], **facts["start"]}
        context.tracker.log(Tags({f"weights/{name}": str(value) for name, value in tags.items()}))
