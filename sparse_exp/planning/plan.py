"""The pre-flight plan: what a run will do, and what is wrong with it, before anything is paid for."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sparse_exp.config.runtimes import skips_zeros
from sparse_exp.config.schema import Experiment
from sparse_exp.errors import RecipeError
from sparse_exp.hardware.targets import advice, measures, mismatch_sentence
from sparse_exp.metrics.anchors import LEAST_RECALL
from sparse_exp.planning.speed import SpeedShares
from sparse_exp.planning.trial import Trial
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sources.start import PARENT, SCRATCH
from sparse_exp.sparsity.measure import (
    GIGA,
    SPARSE_FROM,
    LayerSparsity,
    in_blocks,
    stock_macs,
    total_macs,
    work_sparsity,
)
from sparse_exp.sparsity.prune import BLOCKS
from sparse_exp.sparsity.sizes import Sizes, estimate_sizes
from sparse_exp.sparsity.slimming import choose_channels, weight_scores
from sparse_exp.training.phases import evaluated_epochs
from sparse_exp.training.precision import Precision
from sparse_exp.training.start import Anchors, Start, zeros_for_work
from sparse_exp.yolov5 import YOLOv5
from sparse_exp.yolov5.channels import keep_channels

_SHORT = 0.01  # share of zeros by which a start may miss model.sparsity without a word
_LITTLE_WORK = 0.1  # less work than weights by so much is worth a word


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
class PlannedPhase:
    """One phase of a training.

    Attributes:
        name: such as ``pruned`` or ``pruned_quant``.
        start: epoch at which it begins.
        end: epoch at which it ends.
        rates: first and last learning rate of each schedule that the recipe sets in it; None: the trainer's
            own schedule runs.
        quantized: it trains with fake quantization, in fp32, and without EMA.
        precision: what its floating-point numbers are: ``fp32`` or ``bf16``.
        batch_size: images of a step.
        split: parts that a batch is computed in, so that it fits into memory.
        sparsity: share of zeros in the prunable convolutions at its end, 0..1; None: that of a start which is
            not known yet.
        seconds: estimated time; None where no steps were timed.
    """

    name: str
    start: float
    end: float
    rates: tuple[tuple[float, float], ...] | None
    quantized: bool
    precision: str
    batch_size: int
    split: int = 1
    sparsity: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will do; `sparse_exp.planning.show` says it in words.

    Attributes:
        experiment: the checked configuration.
        start: the start checkpoint.
        recipe: its name; None: the run trains nothing, and takes a checkpoint as it is.
        epochs: length of the training.
        schedules: kinds of learning-rate modifiers in the recipe; empty: the trainer's own schedule runs.
        distills: whether the recipe learns from a teacher.
        matches: layers that each modifier of the recipe matches, by the modifier's name.
        channels_last: memory layout of the training.
        prune_to: sparsity that a dense start is pruned to before training, unless ``model.macs`` says how
            much work is to remain, or ``model.speedup`` how fast it is to be; None for no such step.
        phases: of the training, in order.
        sparsity: share of zeros that the prunable convolutions keep from epoch 0 on, 0..1.
        final_sparsity: share of zeros that they have at the end, 0..1.
        layers: share of zeros that each prunable convolution has at epoch 0, by name, 0..1; empty where
            that is not known.
        warnings: what is allowed and probably not meant, a sentence each.
        sizes: estimated sizes of the files; None without a training.
        trial: what the timed steps showed; None when there were none.
        waits_for_start: the time is not estimated, as data and start are not on this machine yet.
        asked_first: sources that the run asks before it grows the start; empty where it grows none.
        quantization: how layers are rounded, and why; empty where nothing is quantized.
        anchors: how well the anchors suit the training boxes; None where the data are not known.
        macs: multiplications of an image, in 1e9; None without a training.
        dense_macs: the same of the network with all its channels.
        final_work: share of ``macs`` that meet a zero at the end, 0..1; None where it is not known.
        slimming: epochs at which the recipe takes channels out, and the share of the multiplications that
            stays from then on.
        rules: numbers that followed from the data, each with its rule, by label; see
            `sparse_exp.planning.rules`.
        speed: how the shares of zeros were chosen by measured times; None: they were not.
    """

    experiment: Experiment
    start: Start
    recipe: str | None = None
    epochs: float = 0.0
    schedules: tuple[str, ...] = ()
    distills: bool = False
    matches: Mapping[str, Sequence[str]] = field(default_factory=dict)
    channels_last: bool = False
    prune_to: float | None = None
    phases: tuple[PlannedPhase, ...] = ()
    sparsity: float = 0.0
    final_sparsity: float = 0.0
    layers: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    sizes: Sizes | None = None
    trial: Trial | None = None
    waits_for_start: bool = False
    asked_first: tuple[str, ...] = ()
    quantization: str = ""
    anchors: Anchors | None = None
    macs: float | None = None
    dense_macs: float | None = None
    final_work: float | None = None
    slimming: Sequence[tuple[float, float]] = ()
    rules: Mapping[str, str] = field(default_factory=dict)
    speed: SpeedShares | None = None

    @property
    def seconds(self) -> float | None:
        """Estimated time of the training; None when no steps were timed."""
        times = [phase.seconds for phase in self.phases if phase.seconds is not None]
        return sum(times) if times else None


def make_plan(
    experiment: Experiment,
    recipe: Recipe,
    start: Start,
    precision: Precision,
    model: YOLOv5,
    speed: SpeedShares | None = None,
) -> Plan:
    """Plan a training.

    Args:
        experiment: the checked configuration.
        recipe: its recipe.
        start: what is known of the start checkpoint.
        precision: how the floating-point phases compute.
        model: what training starts from, pruned where `pruning_step` says so; where the start's weights
            are unknown any of the architecture.
        speed: how the model's shares of zeros were chosen by measured times, if they were.

    Raises:
        RecipeError: see `pruning_step`.
    """
    prune_to = pruning_step(experiment, recipe, start)
    macs = experiment.model.macs if prune_to is not None else None
    shares, phases = _shares(model, prune_to, macs), recipe.phases()
    first = recipe.expected_sparsity(model, 0.0, shares)
    ends = [recipe.aimed_sparsity(model, phase.end, shares) for phase in phases]
    aimed = [_overall(model, end) for end in ends]
    by_speed = experiment.recipe.shares == "speed"
    unknown = start.sparsity is None and (prune_to is None or by_speed) and recipe.holds_mask
    final, imgsz = _slimmed(model, recipe), experiment.dataset.imgsz
    known = start.sparsity is not None or recipe.prunes_gradually or not recipe.prunes
    work = _work(final, ends[-1]) if known else None
    kinds = re.findall(r"!(\w*LearningRate\w*)", recipe.text) if recipe.sets_learning_rate else []
    return Plan(
        experiment,
        start,
        recipe.name,
        recipe.epochs,
        tuple(sorted(set(kinds))),
        recipe.distills,
        recipe.matches(model),
        precision.channels_last,
        prune_to,
        tuple(
            PlannedPhase(
                phase.name,
                phase.start,
                phase.end,
                tuple(dict.fromkeys(recipe.learning_rates(phase))) if recipe.sets_learning_rate else None,
                phase.quantized,
                str(precision).partition(",")[0],
                experiment.trainer.batch_size,
                sparsity=None if unknown else share,
            )
            for phase, share in zip(phases, aimed, strict=True)
        ),
        sparsity=_overall(model, first),
        final_sparsity=aimed[-1],
        layers=first if prune_to is None or start.sparsity is not None else {},
        warnings=(
            *_warnings(experiment, recipe, start, model),
            *_worth(experiment, aimed[-1], work, pruned_now=prune_to is not None and not by_speed),
        ),
        sizes=estimate_sizes(final, ends[-1], quantized=phases[-1].quantized, imgsz=experiment.dataset.imgsz),
        quantization=recipe.quantization.why if recipe.quantization_start is not None else "",
        macs=total_macs(final.quantizable_convolutions(), imgsz) / GIGA,
        dense_macs=stock_macs(model.size, model.num_classes, imgsz) / GIGA,
        final_work=work,
        slimming=recipe.slimming.moments if recipe.slimming else (),
        speed=speed,
    )


def with_anchors(plan: Plan, anchors: Anchors) -> Plan:
    """The plan with how well the anchors suit the training boxes, and a warning where they do not."""
    warnings = plan.warnings
    if anchors.recall < LEAST_RECALL:
        lost = (
            f"No anchor answers for {1 - anchors.recall:.1%} of the training boxes, which cannot be learned."
        )
        tried = plan.experiment.model.anchors == "auto"
        do = "Set model.anchors=auto, or choose another dataset.imgsz."
        warnings = (*warnings, f"{lost} {'Choose another dataset.imgsz.' if tried else do}")
    return replace(plan, anchors=anchors, warnings=warnings)


def plan_without_training(experiment: Experiment) -> Plan:
    """Plan a run that takes a checkpoint as it is: no recipe is applied.

    Args:
        experiment: the checked configuration.
    """
    start = Start(experiment.checkpoint or "the run's own training", None)
    return Plan(experiment, start, warnings=tuple(_advice(experiment)))


def with_trial(plan: Plan, trial: Trial, recipe: Recipe, data: Data) -> Plan:
    """The plan with what a few timed steps add: the split of each phase's batch, and its time.

    A phase takes its steps and, each ``trainer.val_every`` epochs, a pass over the validation split.

    Args:
        plan: of the training.
        trial: the timed steps.
        recipe: of the training.
        data: how much there is to train on.
    """
    steps, phases = math.ceil(data.train / plan.experiment.trainer.batch_size), []
    for planned, phase in zip(plan.phases, recipe.phases(), strict=True):
        kind = "quantized" if phase.quantized else "float"
        trained = round((phase.end - phase.start) * steps) * trial.seconds[kind]
        evaluations = len(evaluated_epochs(phase, plan.experiment.trainer.val_every))
        evaluated = evaluations * data.val * trial.evaluation[kind]
        split = trial.qat_split if phase.quantized else 1
        size = min(data.train, planned.batch_size) if split > 1 else planned.batch_size
        phases.append(replace(planned, split=split, batch_size=size, seconds=trained + evaluated))
    return replace(plan, phases=tuple(phases), trial=trial)


def _shares(model: YOLOv5, prune_to: float | None, macs: float | None) -> dict[str, float]:
    """Share of zeros of each prunable convolution at epoch 0, as far as it can be known by now."""
    convs = model.prunable_convolutions()
    shares = {name: float((conv.weight == 0).double().mean()) for name, conv in convs.items()}
    if prune_to is not None and not any(shares.values()):  # not pruned yet: by layer it will differ
        return dict.fromkeys(convs, prune_to if macs is None else zeros_for_work(model, macs))
    return shares


def _overall(model: YOLOv5, shares: Mapping[str, float]) -> float:
    """Share of zeros of all prunable convolutions together."""
    sizes = {name: conv.weight.numel() for name, conv in model.prunable_convolutions().items()}
    return sum(shares.get(name, 0.0) * size for name, size in sizes.items()) / sum(sizes.values())


def _slimmed(model: YOLOv5, recipe: Recipe) -> YOLOv5:
    """The detector with about the channels that the recipe leaves, which depend on the training, too.

    Raises:
        ConfigError: so few cannot stay.
    """
    if recipe.slimming is None:
        return model
    final, multiple = copy.deepcopy(model), round(recipe.slimming.multiple)
    keep_channels(
        final, choose_channels(final, weight_scores(final), recipe.slimming.share, multiple=multiple)
    )
    return final


def _work(model: YOLOv5, shares: Mapping[str, float]) -> float:
    """Share of a detector's multiplications that meet a zero, where its layers have these shares of zeros."""
    sizes = {name: conv.weight.numel() for name, conv in model.quantizable_convolutions().items()}
    return work_sparsity(
        [LayerSparsity(name, round(shares.get(name, 0.0) * size), size) for name, size in sizes.items()]
    )


def pruning_step(experiment: Experiment, recipe: Recipe, start: Start) -> float | None:
    """The sparsity to prune a dense start to before training; None for no such step.

    Raises:
        RecipeError: the recipe does not suit the start or the configuration: a transfer that would
            stay dense, no teacher to distill from, nothing to apply in one shot.
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
    if recipe.distills and experiment.recipe.teacher is None:
        raise RecipeError(
            f"{recipe.name} distills, but there is no teacher to learn from. Give a trained checkpoint with "
            "recipe.teacher=PATH, or set recipe.teacher=self (the start checkpoint) or "
            "recipe.teacher=baseline."
        )
    slimming, teacher = recipe.slimming, experiment.recipe.teacher
    if (slimming or experiment.recipe.channels is not None) and start.quantized:
        raise RecipeError(
            f"The start checkpoint ({start.origin}) is quantized, and channels are taken out of networks in "
            "floating point. Give the one before quantization, such as a run's weights/best_pruned.pt."
        )
    first = recipe.distillation_start
    if teacher == PARENT and first is not None and not (slimming and 0 < slimming.start <= first):
        raise RecipeError(
            f"recipe.teacher=parent is the network before its first channels go, and {recipe.name} takes "
            "none out, or at once, or learns from it earlier. Set recipe.teacher to self or a checkpoint."
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
    has, wanted = start.sparsity or 0.0, experiment.model.sparsity
    if start.is_sparse and recipe.holds_mask and has < wanted - _SHORT:
        found.append(
            f"The start checkpoint has {has:.1%} zeros, less than model.sparsity={wanted:g}, and "
            f"{recipe.name} only holds them: the model will have no more. Take a recipe that prunes "
            "(recipe=prune), or a dense start."
        )
    if experiment.trainer.freeze and not start.is_sparse and recipe.holds_mask:
        found.append(
            "trainer.freeze keeps layers as they begin, and the dense start is pruned before: frozen layers "
            "cannot make up for their zeros. Take a sparse start, or a recipe that does not hold zeros."
        )
    prunable = (conv.weight for conv in model.prunable_convolutions().values())
    block = BLOCKS[config.pattern]
    if start.is_sparse and block != (1, 1) and not in_blocks(prunable, block):
        found.append(
            f"recipe.pattern={config.pattern}, but the start checkpoint is pruned already and its zeros are "
            f"not in blocks of {max(block)}: they stay where they are."
        )
    if recipe.slimming and config.channels not in (None, recipe.slimming.share):
        found.append(
            f"recipe.channels={config.channels:g} is not used: {recipe.name} itself says that "
            f"{recipe.slimming.share:.0%} of the work stays."
        )
    for key in ("macs", "speedup"):
        value = getattr(experiment.model, key)
        if value is not None and not recipe.holds_mask:
            found.append(
                f"model.{key}={value:g} is not used: {recipe.name} does not hold the zeros of a start that "
                "is pruned at once."
            )
        elif value is not None and start.is_sparse:
            found.append(f"model.{key}={value:g} is not used: the start checkpoint is pruned already.")
    if config.teacher is not None and not recipe.distills:
        found.append(f"recipe.teacher={config.teacher} is not used: {recipe.name} does not distill.")
    return found


def _worth(experiment: Experiment, weights: float, work: float | None, *, pruned_now: bool) -> Iterator[str]:
    """Where zeros are worth little on the target.

    Args:
        experiment: the checked configuration.
        weights: share of zeros in the prunable convolutions at the end, 0..1.
        work: share of the multiplications that meet one, 0..1; None: not known.
        pruned_now: whether the run itself chooses where the zeros are, and not by measured times.
    """
    engines = experiment.hardware.engines
    skipping = [engine for engine in engines if skips_zeros(engine)]
    if weights < SPARSE_FROM or not measures(experiment):
        return
    if not skipping:
        yield (
            f"The network will have {weights:.0%} zeros, and none of the target's engines "
            f"({', '.join(engines)}) skips zeros: they make the compressed file smaller and nothing faster."
        )
    elif work is not None and work < weights - _LITTLE_WORK:
        do = " recipe.shares=work puts more of them where the work is." if pruned_now else ""
        yield (
            f"The zeros are {weights:.0%} of the weights, {work:.0%} of the work: "
            f"{' and '.join(skipping)} can skip that much of the multiplications at most.{do}"
        )


def _advice(experiment: Experiment) -> list[str]:
    return advice(experiment.hardware, experiment.recipe.name) if measures(experiment) else []


def with_mismatch(plan: Plan, target: str, mismatch: Sequence[str]) -> Plan:
    """The plan, its warnings led by what does not fit the host; see `mismatch_sentence`."""
    if not mismatch:
        return plan
    return replace(plan, warnings=(mismatch_sentence(target, mismatch), *plan.warnings))
