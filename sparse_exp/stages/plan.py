"""What the run will do, and what cannot end well."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from sparse_exp.config.plain import as_dict
from sparse_exp.config.schema import Experiment
from sparse_exp.files import sha256_of
from sparse_exp.sources.start import teacher_file
from sparse_exp.stages.base import Context, Outcome, Stage
from sparse_exp.stages.fingerprint import content_name
from sparse_exp.tracking import Event, Tags

_log = logging.getLogger(__name__)


def _run(context: Context) -> Outcome:
    experiment, recipe = context.experiment, context.recipe
    if "train" not in experiment.stages:
        return Outcome()
    from sparse_exp.planning.plan import with_mismatch
    from sparse_exp.planning.preflight import plan_training
    from sparse_exp.planning.show import as_facts, show_plan

    teacher = teacher_file(experiment.recipe.teacher, context.cache, context.zoo) if recipe.distills else None
    rules = context.run.state.get("settled", {}).get("why", {})
    places = context.dataset, context.precision, context.start
    plan = plan_training(experiment, recipe, *places, teacher, rules)
    plan = with_mismatch(plan, experiment.hardware.name, context.mismatch)
    show_plan(plan)
    found = {"sparsity": plan.start.sparsity, "quantized": plan.start.quantized}
    facts = {**as_facts(plan), "transferred": plan.start.transferred, "start": found}
    chosen = {"trainer/batch_size": experiment.trainer.batch_size, "recipe/epochs": recipe.epochs}
    return Outcome(metrics=chosen, facts=facts, events=_events(context, facts))


def _events(context: Context, facts: dict[str, Any]) -> list[Event]:
    if not context.facts("fetch").get("sha256"):  # a start from random weights has no file
        return []
    tags = {"taken": facts["transferred"], **facts["start"]}
    return [Tags({f"weights/{name}": str(value) for name, value in tags.items()})]


def _marks(context: Context) -> dict[str, Any]:
    """The recipe as it runs, whatever it is called and however its variables came to their values.

    Where the target's times choose the shares of zeros, also how they are measured.
    """
    config = as_dict(context.experiment)["recipe"]
    resolved = ("name", "file", "variables", "num_epochs", "weight_scales", "weight_bits", "train_outputs")
    rest = {key: value for key, value in config.items() if key not in resolved}
    if context.recipe.quantization_start is not None:
        rest["quantization"] = context.recipe.quantization.decided
    marks: dict[str, Any] = {"recipe": {"text": context.recipe.text, **rest}}
    if config["shares"] == "speed":
        hardware = context.experiment.hardware
        marks["hardware"] = [hardware.engines[0], hardware.batch_sizes[0], context.cores, hardware.pinning]
    return marks


def _content(context: Context) -> dict[str, str]:
    """The teacher's checkpoint that the configuration names; one that is gone since counts as unchanged."""
    if "train" not in context.experiment.stages or not context.recipe.distills:
        return {}
    record = context.run.records.get("plan")
    known = record.parts.get(content_name("teacher")) if record else None
    places = context.experiment.recipe.teacher, context.cache, context.zoo
    path = teacher_file(*places, offline=known is not None)
    if path is None and known:
        _log.warning("The teacher %s is not on this machine: it counts as unchanged.", places[0])
        return {"teacher": known}
    return {"teacher": sha256_of(path)} if path else {}


def _certain_names(experiment: Experiment) -> Iterator[str]:
    if "train" in experiment.stages:
        yield from ("trainer/batch_size", "recipe/epochs")


STAGE = Stage(
    name="plan",
    run=_run,
    depends_on=("seed", "trainer"),
    marks=_marks,
    content=_content,
    shared=lambda _: True,
    certain_names=_certain_names,
)
