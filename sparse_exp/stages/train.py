"""Fine-tuning under the recipe, or applying it at once; the best checkpoint of the last phase goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparse_exp.config.schema import Experiment
from sparse_exp.files import sha256_of, write_json
from sparse_exp.runs.replay import HISTORY
from sparse_exp.stages.base import Context, Outcome, Stage
from sparse_exp.stages.sparsity_csv import write_sparsity
from sparse_exp.tracking import Artifact


def _run(context: Context) -> Outcome:
    from sparse_exp.stages.training import run_training
    from sparse_exp.training.state import STATE

    weights, directory = context.run.path / "weights", context.run.path
    weights.mkdir(exist_ok=True)
    result, composed = run_training(context)
    history = write_json(directory / HISTORY, result.history)
    phase, best = list(result.phases.items())[-1]
    table = write_sparsity(context, best.path, best.promised)
    recipe = context.run.write_recipe(composed)
    facts = {
        "checkpoint": str(best.path.relative_to(directory)),
        "phase": phase,
        "epoch": best.epoch,
        "promised": best.promised,
        "recipe": composed,
        "devices": context.experiment.trainer.devices,
        "threads": context.threads,
    }
    state = directory / STATE
    checkpoints = sorted(path for path in weights.glob("[!.]*.pt") if path != state)
    files = [history, table, recipe, *checkpoints]
    return Outcome(files, facts=facts, events=[Artifact(recipe), Artifact(table)], spent=[state])


def _marks(context: Context) -> dict[str, Any]:
    """What was found before: the baseline that a training learns from, and shares by measured times."""
    found: dict[str, Any] = {}
    if context.experiment.recipe.teacher == "baseline":
        facts, file = context.facts("baseline"), context.run.baseline_checkpoint
        found["teacher"] = [facts.get("map50"), sha256_of(file) if file else facts.get("checkpoint")]
    if shares := context.facts("plan").get("shares"):
        found["shares"] = shares
    return found


def _check(experiment: Experiment) -> Iterator[str]:
    if experiment.checkpoint and "train" in experiment.stages:
        yield (
            "checkpoint=PATH is for runs without the train stage. Use model.weights=PATH to start a "
            "training from it, or leave train out of stages."
        )


STAGE = Stage(
    name="train",
    run=_run,
    marks=_marks,
    shared=lambda _: True,
    computes=True,
    check=_check,
)
