"""The pre-flight plan: what a run will do, and what is wrong with it, before anything is paid for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError, RecipeError

if TYPE_CHECKING:
    from rich.table import Table

    from sparse_exp.sparsity.recipe import Phase, Recipe
    from sparse_exp.training.precision import Precision

SPARSE_FROM = 0.10  # share of zeros from which a checkpoint counts as pruned; SparseML's own threshold


@dataclass(frozen=True)
class Start:
    """What is known of the start checkpoint.

    Attributes:
        origin: where it comes from.
        sparsity: share of zeros in its prunable convolutions; None when it is not on this machine yet.
        quantized: whether it went through QAT.
    """

    origin: str
    sparsity: float | None
    quantized: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        start: the start checkpoint.
        prune_to: sparsity that a dense start is pruned to before training; None for no such step.
        phases: a row for each phase, as texts by column.
        facts: other lines, by label.
        sparsity: share of zeros that the prunable convolutions keep from epoch 0 on, 0..1.
    """

    start: Start
    prune_to: float | None
    phases: list[dict[str, str]]
    facts: dict[str, str]
    sparsity: float = 0.0

    @property
    def pruning(self) -> str:
        """The inserted pruning step as a sentence; empty when there is none."""
        if self.prune_to is None:
            return ""
        known = "The start checkpoint is dense" if self.start.sparsity is not None else "Should it be dense"
        return (
            f"{known}: its prunable convolutions are pruned to {self.prune_to:.0%} zeros "
            "(smallest layer-adaptive magnitudes) before epoch 0, so that the transfer starts sparse."
        )


def make_plan(experiment: Experiment, recipe: Recipe, start: Start, precision: Precision) -> Plan:
    """Lay out a run.

    Args:
        experiment: the checked configuration.
        recipe: its recipe.
        start: what is known of the start checkpoint.
        precision: how the floating-point phases compute.

    Raises:
        RecipeError: the recipe does not suit the start: a transfer that would stay dense, or a
            second quantization.
    """
    prune_to = _pruning_step(experiment, recipe, start)
    kept = prune_to if prune_to is not None and recipe.prunes else start.sparsity
    sparsity = "that of the start" if kept is None else f"{kept:.1%}"
    facts = {
        "model": f"{experiment.model.name} from {start.origin}",
        "data": f"{experiment.dataset.name}, {experiment.dataset.imgsz} px",
        "recipe": f"{recipe.name}, {recipe.epochs:g} epochs of batch {experiment.trainer.batch_size}",
        "learning rate": "set by the recipe" if recipe.sets_learning_rate else "the trainer's cosine",
        "engines": ", ".join(experiment.hardware.engines),
        "stages": " -> ".join(experiment.stages),
    }
    phases = [_row(phase, recipe, sparsity, precision) for phase in recipe.phases()]
    return Plan(start, prune_to, phases, facts, sparsity=(kept or 0.0) if recipe.prunes else 0.0)


def _pruning_step(experiment: Experiment, recipe: Recipe, start: Start) -> float | None:
    if start.quantized and recipe.quantization_start is not None:
        raise RecipeError(
            f"The start checkpoint ({start.origin}) is quantized already, and {recipe.name} would quantize "
            "it again. Start from a checkpoint before QAT, such as a run's weights/best_pruned.pt."
        )
    is_sparse = start.sparsity is not None and start.sparsity >= SPARSE_FROM
    if is_sparse or not recipe.holds_mask:
        return None
    if not experiment.recipe.prune_dense_start:
        if start.sparsity is None:  # not fetched yet; the run's own plan will know
            return None
        raise RecipeError(
            f"The start checkpoint ({start.origin}) is dense, and {recipe.name} only keeps zeros that are "
            "there: the model would stay dense. Give a pruned one with model.weights=PATH, or set "
            "recipe.prune_dense_start=true."
        )
    return experiment.model.sparsity


def _row(phase: Phase, recipe: Recipe, sparsity: str, precision: Precision) -> dict[str, str]:
    rates = recipe.learning_rates(phase)
    return {
        "phase": phase.name,
        "epochs": f"{phase.start:g} to {phase.end:g}",
        "learning rate": ", ".join(f"{first:g} to {last:g}" for first, last in rates) or "trainer's",
        "EMA": "off" if phase.quantized else "on",
        "precision": "QAT int8 in fp32" if phase.quantized else str(precision),
        "sparsity": sparsity,
    }


def check_host(experiment: Experiment) -> None:
    """Refuse engines that cannot run here, before anything is trained for them.

    Raises:
        ConfigError: every problem found.
    """
    from sparse_exp.hardware import check_engines

    if {"verify", "benchmark"} & set(experiment.stages):
        problems = check_engines(experiment.hardware)
        if problems:
            raise ConfigError(problems)


def render(plan: Plan) -> list[Table | str]:
    """The plan as what is printed: lines and a table."""
    from rich.table import Table

    table = Table(title="Plan", title_justify="left", box=None, pad_edge=False)
    for column in plan.phases[0]:
        table.add_column(column)
    for row in plan.phases:
        table.add_row(*row.values())
    lines = [f"{label}: {text}" for label, text in plan.facts.items()]
    return [*lines, *([plan.pruning] if plan.pruning else []), table]
