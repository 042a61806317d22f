"""All stages, in the order in which they run.

To add one, write its file with a `Stage` beside the others and add it here. To let it run by default, add its
name to `sparse_exp.config.schema.STAGES`, too, which Hydra reads without importing stages.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparse_exp.config.schema import Experiment
from sparse_exp.errors import expected
from sparse_exp.stages import (
    baseline,
    benchmark,
    evaluate,
    export,
    fetch,
    plan,
    publish,
    register,
    report,
    train,
    verify,
)
from sparse_exp.stages.base import Stage

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE
    for module in (
        fetch, plan, baseline, train, evaluate, export, verify, benchmark, report, publish, register
    )
}  # fmt: skip


def wanted_stages(experiment: Experiment) -> list[str]:
    """The stages of an experiment in their order, without those that would do nothing."""
    return [s.name for s in STAGES.values() if s.name in experiment.stages and s.wanted(experiment)]


def check_stages(experiment: Experiment) -> Iterator[str]:
    """Problems of the choice of stages, and those that each of them sees; a sentence or two each."""
    names = ", ".join(STAGES)
    if not experiment.stages:
        yield expected("stages", f"some of {names}", [], "Name at least one.")
    for unknown in [name for name in experiment.stages if name not in STAGES]:
        yield expected("stages", f"one of {names}", unknown, "Set stages to one of them.")
    chosen = [stage for stage in STAGES.values() if stage.name in experiment.stages]
    without = next((stage.name for stage in chosen if stage.needs_checkpoint), None)
    if without and "train" not in experiment.stages and not (experiment.checkpoint or experiment.resume):
        yield (
            f"stages={','.join(experiment.stages)} leaves out train, but {without} needs a trained "
            "checkpoint. Give it with checkpoint=PATH, or add train to stages."
        )
    without = next((stage.name for stage in chosen if stage.needs_files), None)
    if without and "export" not in experiment.stages and not experiment.resume:
        yield (
            f"{without} needs exported files. Add export to stages, or give a run that has "
            "them with resume=RUN."
        )
    for stage in STAGES.values():  # also of stages that are left out: keys of their own ask for some
        yield from stage.check(experiment)
