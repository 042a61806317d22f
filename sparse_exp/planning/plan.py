"""The pre-flight plan: what a run will do, and what is wrong with it, before anything is paid for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sparse_exp.config.schema import Experiment, HardwareConfig, TrainerConfig
from sparse_exp.errors import RecipeError
from sparse_exp.hardware.targets import measures, mismatch_sentence
from sparse_exp.sources.start import SCRATCH
from sparse_exp.sparsity.measure import in_blocks
from sparse_exp.training.start import Start

if TYPE_CHECKING:
    from rich.table import Table

    from sparse_exp.planning.trial import Trial
    from sparse_exp.sparsity.recipe import Phase, Recipe
    from sparse_exp.sparsity.sizes import Sizes
    from sparse_exp.training.precision import Precision
    from sparse_exp.yolov5 import YOLOv5

_CHOSEN = {"adaptive": "smallest layer-adaptive magnitudes", "uniform": "smallest magnitudes of each layer"}


@dataclass(frozen=True)
class Data:
    """How much there is to train on.

    Attributes:
        train: images of the training split.
        val: images of the validation split.
    """

    train: int
    val: int


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        start: the start checkpoint.
        prune_to: sparsity that a dense start is pruned to before training; None for no such step.
        phases: a row for each phase, as texts by column.
        facts: other lines, by label.
        sparsity: share of zeros that the prunable convolutions keep from epoch 0 on, 0..1.
        final_sparsity: share of zeros that they have at the end, 0..1.
        pattern: of the zeros that the inserted pruning step makes, as ``recipe.pattern``.
        shares: of the zeros that each layer gets, as ``recipe.shares``.
        warnings: what is allowed and probably not meant, a sentence each.
        sizes: estimated sizes in MB, by name.
        seconds: estimated time of the training; None when no steps were timed.
        trial: what the timed steps showed; None when there were none.
        layers: share of zeros that each prunable convolution has at epoch 0, by name, 0..1; empty where
            that is not known.
    """

    start: Start
    prune_to: float | None
    phases: list[dict[str, str]]
    facts: dict[str, str]
    sparsity: float = 0.0
    final_sparsity: float = 0.0
    pattern: str = "unstructured"
    shares: str = "adaptive"
    warnings: list[str] = field(default_factory=list)
    sizes: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    trial: Trial | None = None
    layers: dict[str, float] = field(default_factory=dict)

    @property
    def pruning(self) -> str:
        """The inserted pruning step as a sentence; empty when there is none."""
        if self.prune_to is None:
            return ""
        known = "The start checkpoint is dense" if self.start.sparsity is not None else "Should it be dense"
        blocks = " in blocks of 4 input channels" if self.pattern == "block4" else ""
        return (
            f"{known}: its prunable convolutions are pruned to {self.prune_to:.0%} zeros{blocks} "
            f"({_CHOSEN[self.shares]}) before epoch 0, so that the transfer starts sparse."
        )

    def as_facts(self) -> dict[str, Any]:
        """The plan as plain data, for the run's manifest."""
        trial = self.trial
        return {
            "prune_to": self.prune_to,
            "pattern": self.pattern,
            "pruning": self.pruning,
            "phases": self.phases,
            "sparsity": self.sparsity,
            "layers": self.layers,
            "final_sparsity": self.final_sparsity,
            "lines": self.facts,
            "warnings": self.warnings,
            "sizes": self.sizes,
            "left": list(self.start.left),
            "qat_split": trial.qat_split if trial else 1,
            "seconds_per_step": trial.seconds if trial else {},
            "peak_mb": trial.peak_mb if trial else {},
            "estimated_s": self.seconds,
        }


def make_plan(
    experiment: Experiment, recipe: Recipe, start: Start, precision: Precision, model: YOLOv5
) -> Plan:
    """Lay out a run.

    Args:
        experiment: the checked configuration.
        recipe: its recipe.
        start: what is known of the start checkpoint.
        precision: how the floating-point phases compute.
        model: what training starts from, pruned where `pruning_step` says so; where the start's weights
            are unknown any of the architecture.

    Raises:
        RecipeError: see `pruning_step`.
    """
    prune_to = pruning_step(experiment, recipe, start)
    shares, phases = _shares(model, prune_to), recipe.phases()
    first = recipe.expected_sparsity(model, 0.0, shares)
    ends = [recipe.expected_sparsity(model, phase.end, shares) for phase in phases]
    promised = [_overall(model, end) for end in ends]
    unknown = start.sparsity is None and prune_to is None and recipe.holds_mask
    texts = ["that of the start" if unknown else f"{share:.1%}" for share in promised]
    sizes = _sizes(experiment, model, ends[-1], quantized=phases[-1].quantized)
    return Plan(
        start,
        prune_to,
        _rows(experiment, recipe, precision, texts),
        _facts(experiment, recipe, start, precision, model, sizes),
        sparsity=_overall(model, first),
        final_sparsity=promised[-1],
        pattern=experiment.recipe.pattern,
        shares=experiment.recipe.shares,
        warnings=_warnings(experiment, recipe, start, model),
        sizes=asdict(sizes),
        layers=first if prune_to is None or start.sparsity is not None else {},
    )


def plan_without_training(experiment: Experiment) -> Plan:
    """Lay out a run that takes a checkpoint as it is: no recipe is applied.

    Args:
        experiment: the checked configuration.
    """
    origin = experiment.checkpoint or "the run's own training"
    facts = {"checkpoint": origin, **_setting(experiment)}
    return Plan(Start(origin, None), None, [], facts, warnings=_advice(experiment))


def with_trial(plan: Plan, trial: Trial, recipe: Recipe, data: Data, trainer: TrainerConfig) -> Plan:
    """The plan with what a few timed steps add: the batch of each phase and its time.

    A phase takes its steps and, after each epoch, a forward pass over the validation split.
    """
    steps, size = math.ceil(data.train / trainer.batch_size), min(data.train, trainer.batch_size)
    rows, total = [], 0.0
    for row, phase in zip(plan.phases, recipe.phases(), strict=True):
        kind = "quantized" if phase.quantized else "float"
        count = round((phase.end - phase.start) * steps)
        seconds = count * trial.seconds[kind] + _evaluations(phase) * data.val * trial.evaluation[kind]
        total += seconds
        split = trial.qat_split if phase.quantized else 1
        batch = f"{split} x {math.ceil(size / split)}" if split > 1 else row["batch"]
        rows.append({**row, "batch": batch, "time": duration(seconds)})
    alone = " of one process with the threads of all" if trainer.devices > 1 else ""
    facts = {**plan.facts, "time": f"about {duration(total)} of training, from a few timed steps{alone}"}
    if trial.peak_mb:
        peaks = [f"{peak / 1000:.1f} GB ({kind} steps)" for kind, peak in trial.peak_mb.items()]
        facts["memory"] = f"at most {', '.join(peaks)}"
    return replace(plan, phases=rows, facts=facts, seconds=total, trial=trial)


def duration(seconds: float) -> str:
    """Seconds as words: ``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _evaluations(phase: Phase) -> int:
    """How often a phase is evaluated: at each whole epoch within it, and where it ends."""
    within = range(math.floor(phase.start) + 1, math.ceil(phase.end))
    return len(within) + 1


def _shares(model: YOLOv5, prune_to: float | None) -> dict[str, float]:
    """Share of zeros of each prunable convolution at epoch 0, as far as it can be known by now."""
    convs = model.prunable_convolutions()
    shares = {name: float((conv.weight == 0).double().mean()) for name, conv in convs.items()}
    if prune_to is not None and _overall(model, shares) < prune_to:
        return dict.fromkeys(convs, prune_to)  # not pruned yet: by layer it will differ, over all it is this
    return shares


def _overall(model: YOLOv5, shares: Mapping[str, float]) -> float:
    """Share of zeros of all prunable convolutions together."""
    sizes = {name: conv.weight.numel() for name, conv in model.prunable_convolutions().items()}
    return sum(shares.get(name, 0.0) * size for name, size in sizes.items()) / sum(sizes.values())


def _sizes(experiment: Experiment, model: YOLOv5, shares: Mapping[str, float], *, quantized: bool) -> Sizes:
    from sparse_exp.sparsity.sizes import estimate_sizes

    return estimate_sizes(model, shares, quantized=quantized, imgsz=experiment.dataset.imgsz)


def pruning_step(experiment: Experiment, recipe: Recipe, start: Start) -> float | None:
    """The sparsity to prune a dense start to before training; None for no such step.

    Raises:
        RecipeError: the recipe does not suit the start or the configuration: a transfer that would
            stay dense, a quantized start, no teacher to distill from, nothing to apply in one shot.
    """
    _refuse(experiment, recipe, start)
    if start.is_sparse or not recipe.holds_mask:
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


def _refuse(experiment: Experiment, recipe: Recipe, start: Start) -> None:
    if start.quantized:
        again = (
            "would quantize it again" if recipe.quantization_start is not None else "trains in floating point"
        )
        raise RecipeError(
            f"The start checkpoint ({start.origin}) is quantized already, and {recipe.name} {again}. "
            "Start from the checkpoint before QAT: ?checkpoint=preqat behind a stub, or a run's "
            "weights/best_pruned.pt."
        )
    if recipe.distills and experiment.recipe.teacher is None:
        raise RecipeError(
            f"{recipe.name} distills, but there is no teacher to learn from. Give a trained checkpoint with "
            "recipe.teacher=PATH, or set recipe.teacher=self (the start checkpoint) or "
            "recipe.teacher=baseline."
        )
    if experiment.recipe.oneshot and not recipe.prunes and recipe.quantization_start is None:
        raise RecipeError(
            f"recipe.oneshot applies a recipe without training, and {recipe.name} neither prunes nor "
            "quantizes. Take recipe=oneshot, or set recipe.oneshot=false."
        )


def _warnings(experiment: Experiment, recipe: Recipe, start: Start, model: YOLOv5) -> list[str]:
    config, found = experiment.recipe, _advice(experiment)
    if start.origin == SCRATCH:
        found.append("The start is random (model.weights=scratch): the accuracies will mean little.")
    if start.is_sparse and not recipe.prunes:
        found.append(
            f"The start checkpoint has {start.sparsity:.1%} zeros and {recipe.name} does not hold them: "
            "training fills them in."
        )
    prunable = (conv.weight for conv in model.prunable_convolutions().values())
    if start.is_sparse and config.pattern == "block4" and not in_blocks(prunable):
        found.append(
            "recipe.pattern=block4, but the start checkpoint is pruned already and its zeros are not in "
            "blocks of 4: they stay where they are."
        )
    if config.teacher is not None and not recipe.distills:
        found.append(f"recipe.teacher={config.teacher} is not used: {recipe.name} does not distill.")
    return found


def _advice(experiment: Experiment) -> list[str]:
    from sparse_exp.hardware.targets import advice

    return advice(experiment.hardware, experiment.recipe.name) if measures(experiment) else []


def _rows(
    experiment: Experiment, recipe: Recipe, precision: Precision, sparsity: Sequence[str]
) -> list[dict[str, str]]:
    phases, config = recipe.phases(), experiment.recipe
    if config.oneshot:
        last = {"phase": phases[-1].name, "epochs": "none", "precision": _numbers(phases[-1], precision)}
        return [{**last, "calibration": f"{config.calibration_images} images", "sparsity": sparsity[-1]}]
    batch = str(experiment.trainer.batch_size)
    return [
        {
            "phase": phase.name,
            "epochs": f"{phase.start:g} to {phase.end:g}",
            "learning rate": _rates(phase, recipe),
            "EMA": "off" if phase.quantized else "on",
            "precision": _numbers(phase, precision),
            "batch": batch,
            "sparsity": text,
        }
        for phase, text in zip(phases, sparsity, strict=True)
    ]


def _rates(phase: Phase, recipe: Recipe) -> str:
    if not recipe.sets_learning_rate:
        return "trainer's"
    rates = dict.fromkeys(f"{first:g} to {last:g}" for first, last in recipe.learning_rates(phase))
    return ", ".join(rates) or "as before"


def _numbers(phase: Phase, precision: Precision) -> str:
    return "int8 in fp32" if phase.quantized else str(precision).partition(",")[0]


def _facts(
    experiment: Experiment, recipe: Recipe, start: Start, precision: Precision, model: YOLOv5, sizes: Sizes
) -> dict[str, str]:
    config, batch = experiment.recipe, experiment.trainer.batch_size
    trained = f"{recipe.epochs:g} epochs of batch {batch}, {config.optimizer}"
    facts = {
        "model": f"{experiment.model.name} from {start.origin}",
        "grown": f"from {start.grown_from}: no checkpoint of {experiment.model.name} can be had; this "
        "smaller one is made larger so that it computes nearly the same",
        "left": f"{len(start.left)} tensors keep initial class scores: {_shortened(start.left)}",
        **_setting(experiment),
        "recipe": f"{recipe.name}, {'in one shot, without training' if config.oneshot else trained}",
        "teacher": f"{config.teacher}",
        "learning rate": _schedule(recipe, experiment.trainer),
        "memory layout": "channels_last" if precision.channels_last else "contiguous",
        "baseline": f"{experiment.recovery.baseline} (recovery.baseline)",
        **{
            label: f"{len(names)} layers: {_shortened(names)}"
            for label, names in recipe.matches(model).items()
        },
        "expected sizes": f"checkpoint {sizes.checkpoint_mb:.1f} MB, model.onnx {sizes.onnx_mb:.1f} MB, "
        f"compressed {sizes.onnx_gzip_mb:.1f} MB (estimates)",
    }
    without = {
        "grown": not start.grown_from,
        "left": not start.left,
        "teacher": not recipe.distills,
        "learning rate": config.oneshot,
        "baseline": experiment.recovery.baseline == "none",
    }
    return {label: text for label, text in facts.items() if not without.get(label)}


def _setting(experiment: Experiment) -> dict[str, str]:
    return {
        "data": f"{experiment.dataset.name}, {experiment.dataset.imgsz} px",
        "engines": ", ".join(experiment.hardware.engines),
        "target": _target(experiment.hardware),
        "stages": " -> ".join(experiment.stages),
    }


def _target(hardware: HardwareConfig) -> str:
    """What will be measured, and which recipes suit that."""
    from sparse_exp.hardware import host_facts, usable_physical_cores
    from sparse_exp.hardware.targets import prefers

    cores = ", ".join(map(str, hardware.cores)) or str(usable_physical_cores())
    batches = ", ".join(map(str, hardware.batch_sizes))
    recipes = ", ".join(prefers(hardware, host_facts()).recipes)
    measured = f"{' and '.join(hardware.scenarios)} on {cores} cores, batch {batches}"
    return f"{hardware.name}: {measured}; recipes that suit it: {recipes}"


def _schedule(recipe: Recipe, trainer: TrainerConfig) -> str:
    own = f"trainer.lr={trainer.lr:g}, trainer.warmup={trainer.warmup:g}"
    if not recipe.sets_learning_rate:
        return f"the trainer's warm-up and cosine ({own})"
    kinds = sorted(set(re.findall(r"!(\w*LearningRate\w*)", recipe.text)))
    return f"set by the recipe ({', '.join(kinds)}); the trainer's own schedule ({own}) is not used"


def _shortened(names: Sequence[str], most: int = 3) -> str:
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])}, ... {names[-1]}"


def with_mismatch(plan: Plan, target: str, mismatch: Sequence[str]) -> Plan:
    """The plan, its warnings led by what does not fit the host; see `mismatch_sentence`."""
    if not mismatch:
        return plan
    return replace(plan, warnings=[mismatch_sentence(target, mismatch), *plan.warnings])


def render(plan: Plan) -> list[Table | str]:
    """The plan as what is printed: lines and a table."""
    from rich.table import Table

    table = Table(title="Plan", title_justify="left", box=None, pad_edge=False)
    for column in next(iter(plan.phases), ()):
        table.add_column(column)
    for row in plan.phases:  # several learning rates of a phase go below each other
        table.add_row(*(text.replace(", ", "\n") for text in row.values()))
    lines = [f"{label}: {text}" for label, text in plan.facts.items()]
    sentences = [plan.pruning] if plan.pruning else []
    tables = [table] if plan.phases else []
    return [*lines, *sentences, *(f"Warning: {warning}" for warning in plan.warnings), *tables]
