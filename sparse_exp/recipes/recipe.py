"""Recipes: read one, know its phases, apply it to a model. The one door to SparseML.

SparseML is no longer maintained since June 2025. The rest of the project uses only the small interface of
`Recipe` and `Sparsifier`, so that SparseML can be replaced here.
"""

from __future__ import annotations

import difflib
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from sparse_exp.errors import RecipeError, expected, first_line
from sparse_exp.quantization.quantizers import (
    freeze_quantizers,
    is_quantized,
    pin_input_quantizer,
    quantized_layers,
)
from sparse_exp.recipes.distillation import Distiller, LayerTerm, OutputTerm
from sparse_exp.recipes.layer_patterns import (
    check_target,
    layers_matching,
    matches_parameter,
    targets_of,
)
from sparse_exp.recipes.modifiers import (
    Phase,
    check_blocks,
    gradual_of,
    group_size,
    holds,
    layer_pairs,
    overlaps,
    rate_at,
    rates,
    recipe_text,
    start_of,
)
from sparse_exp.recipes.schedule import (
    body_of,
    check_variables,
    modifiers_of,
    read_body,
    renamed_stages,
    rescaled,
    set_anchored,
    stages_of,
    time_map,
    without,
)
from sparse_exp.recipes.sparsifier import ManagedSparsifier, Sparsifier
from sparse_exp.yolov5 import YOLOv5

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # sparseml 1.8 imports pkg_resources, which warns
    from sparseml.pytorch.optim import ScheduledModifierManager
    from sparseml.pytorch.sparsification.pruning import (
        BaseGradualPruningModifier,
        GMPruningModifier,
        MovementPruningModifier,
        RigLPruningModifier,
        StructuredPruningModifier,
        modifier_pruning_base,
    )
    from sparseml.pytorch.sparsification.quantization import quantization_scheme
    from sparseml.pytorch.utils import LambdaLogger, LoggerManager
    from sparseml.utils import FROM_PARAM_TOKEN, interpolate


class _QConfig(torch.ao.quantization.QConfig):
    """A QConfig with settable attributes: SparseML sets its scheme on it, which torch's no longer allows."""


def _qconfig(activation: Any, weight: Any) -> _QConfig:
    observers = [args.get_observer() if args else nn.Identity for args in (activation, weight)]
    return _QConfig(activation=observers[0], weight=observers[1])  # type: ignore[no-untyped-call]


def _interpolate(now: float, start: float, end: float, *values: Any) -> float:
    # For a step after the end SparseML's own gives the first value, or a complex number.
    return float(interpolate(min(max(now, start), end), start, end, *values))


quantization_scheme._get_qconfig = _qconfig
modifier_pruning_base.interpolate = _interpolate

logging.getLogger("sparseml").setLevel(logging.WARNING)
# It warns that it has no teacher. The distillation used here is `Distiller`.
logging.getLogger("sparseml.pytorch.sparsification.distillation").setLevel(logging.ERROR)

__all__ = [
    "Phase",
    "Recipe",
    "Sparsifier",
    "freeze_quantizers",
    "is_quantized",
    "pin_input_quantizer",
    "quantized_layers",
]
_NOT_PER_LAYER = (StructuredPruningModifier, RigLPruningModifier)


class Recipe:
    """A SparseML recipe with its variables filled in.

    Args:
        text: the recipe, YAML or Markdown with YAML front matter.
        variables: values for root variables of the recipe; a variable that is None keeps its value.
        name: the recipe's name, for messages.
        num_epochs: length to which the whole schedule is stretched or squeezed (see
            `sparse_exp.recipes.schedule.time_map`), more than 0; None keeps its length.

    Attributes:
        name: as given.

    Raises:
        RecipeError: the text is no recipe, or has no such variable.
    """

    def __init__(
        self,
        text: str,
        variables: Mapping[str, float | None] | None = None,
        name: str = "recipe",
        num_epochs: float | None = None,
    ) -> None:
        self.name = name
        body = body_of(text)
        roots = read_body(body, name)
        check_variables(roots, variables or {}, name)
        _check_kinds([modifier.kind for modifier in modifiers_of(roots)], name)
        given = {key: value for key, value in (variables or {}).items() if value is not None}
        self._manager = _load(set_anchored(body, given), name, given)
        if num_epochs is not None and self.epochs > 0:
            boundaries = [0.0, *(phase.end for phase in self.phases())]
            self._manager = _load(rescaled(self.text, time_map(boundaries, num_epochs)), name)

    @classmethod
    def from_file(
        cls,
        path: Path,
        variables: Mapping[str, float | None] | None = None,
        num_epochs: float | None = None,
    ) -> Recipe:
        """Read a recipe from a file: ``.md`` with front matter, or ``.yaml``.

        Args:
            path: the file.
            variables: see `Recipe`.
            num_epochs: see `Recipe`.

        Raises:
            RecipeError: the file cannot be read, or see `Recipe`.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"Cannot read the recipe {path}: {error}. Check recipe.file.") from error
        return cls(text, variables, name=path.name, num_epochs=num_epochs)

    def __reduce__(self) -> tuple[type[Recipe], tuple[str, None, str]]:
        """Pickle the recipe as its text, because SparseML's objects cannot be pickled."""
        return type(self), (self.text, None, self.name)

    @property
    def text(self) -> str:
        """The recipe with its variables filled in, as YAML that SparseML can read."""
        return recipe_text(self._manager)

    @property
    def epochs(self) -> float:
        """Length of the training in epochs."""
        # SparseML's own max_epochs is rounded up to whole epochs.
        return max(float(max(m.start_epoch, m.end_epoch)) for m in self._manager.iter_modifiers())

    @property
    def quantization_start(self) -> float | None:
        """Epoch at which QAT begins; None for a recipe without quantization."""
        starts = [start_of(m) for m in self._modifiers("QuantizationModifier")]
        return min(starts) if starts else None

    @property
    def prunes(self) -> bool:
        """Whether the recipe makes zeros or keeps those of the start."""
        return bool(self._pruning())

    @property
    def prunes_gradually(self) -> bool:
        """Whether the recipe makes zeros while it trains."""
        return bool(gradual_of(self._manager))

    @property
    def pruning_end(self) -> float | None:
        """Epoch at which the last gradual modifier reaches its final sparsity; None without any."""
        ends = [float(m.end_epoch) for m in gradual_of(self._manager)]
        return max(ends) if ends else None

    @property
    def holds_mask(self) -> bool:
        """Whether the recipe only keeps the zeros of the start, and makes none."""
        return bool(self._modifiers("ConstantPruningModifier")) and not self.prunes_gradually

    @property
    def distills(self) -> bool:
        """Whether the recipe needs a teacher."""
        return bool(self._modifiers("DistillationModifier"))

    @property
    def sets_learning_rate(self) -> bool:
        """Whether the recipe's modifiers replace the trainer's own learning-rate schedule."""
        return any("LearningRate" in type(modifier).__name__ for modifier in self._manager.iter_modifiers())

    def phases(self) -> list[Phase]:
        """The phases of the training, in order."""
        gradual = [(start_of(m), float(m.end_epoch)) for m in gradual_of(self._manager)]
        first_zeros = min((start_of(m) for m in self._pruning()), default=self.epochs)
        quantization = self.quantization_start
        cuts = {
            0.0,
            self.epochs,
            first_zeros,
            quantization or 0.0,
            *(cut for span in gradual for cut in span),
        }
        inside = sorted(cut for cut in cuts if 0.0 <= cut <= self.epochs)
        phases: list[Phase] = []
        for start, end in pairwise(inside):
            rising = any(first <= start < last for first, last in gradual)
            name = "pruning" if rising else "pruned" if start >= first_zeros else "dense"
            quantized = quantization is not None and start >= quantization
            name += "_quant" if quantized else ""
            if phases and phases[-1].name == name:
                start = phases.pop().start
            phases.append(Phase(name, start, end, quantized))
        return phases

    def learning_rates(self, phase: Phase) -> list[tuple[float, float]]:
        """(first, last) learning rate within a phase for each modifier that acts in it, in order.

        Where none acts, the rate that was last set before the phase continues.
        """
        modifiers = [m for m in self._manager.iter_modifiers() if "LearningRate" in type(m).__name__]
        modifiers.sort(key=start_of)
        acting = [rates(m, phase) for m in modifiers if overlaps(m, phase)]
        before = [m for m in modifiers if start_of(m) < phase.start]
        if not acting and before:
            last = rate_at(before[-1], phase.start)
            return [(last, last)]
        return acting

    def matches(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers on which each modifier that names layers acts.

        Args:
            model: before quantization; not changed.

        Returns:
            For each such modifier, by its kind (numbered if there are several of a kind), the published names
            of its layers in the model's order.
        """
        found: list[tuple[str, list[str]]] = []
        for modifier in self._manager.iter_modifiers():
            kind, pairs = type(modifier).__name__, list(targets_of(modifier))
            if kind == "QuantizationModifier":
                found.append((kind, quantized_layers(self.apply_structure(deepcopy(model)))))
            elif pairs:
                layers = {layer for pair in pairs for layer in layers_matching(*pair, model)}
                order = [name for name, _ in model.named_modules()]
                found.append((kind, sorted(layers, key=order.index)))
        kinds = [kind for kind, _ in found]
        labels = [
            kind if kinds.count(kind) == 1 else f"{kind} {kinds[:index].count(kind) + 1}"
            for index, kind in enumerate(kinds)
        ]
        return dict(zip(labels, (layers for _, layers in found), strict=True))

    def expected_sparsity(self, model: YOLOv5, epoch: float, start: Mapping[str, float]) -> dict[str, float]:
        """The least share of zeros that the recipe promises for each prunable convolution at an epoch.

        A layer whose zeros are held keeps the share that it started with. A layer pruned by magnitude has the
        sparsity of the last update that must have happened by then. Other kinds of pruning promise nothing
        before they end.

        Args:
            model: the detector, before or after quantization.
            epoch: a moment between two steps; 0 is before the first step.
            start: shares of zeros at epoch 0 by the layers' published names, 0..1.

        Returns:
            Shares of zeros by the layers' published names, 0..1.
        """
        held, gradual = self._modifiers("ConstantPruningModifier"), gradual_of(self._manager)
        promised = {}
        for name, conv in model.prunable_convolutions().items():
            before, weights = start.get(name, 0.0), conv.weight.numel()
            shares = [before for m in held if holds(m, name, epoch)]
            for modifier in gradual:
                kept = modifier.leave_enabled or any(
                    holds(m, name, epoch, at=modifier.end_epoch) for m in held
                )
                shares.append(_promised_share(modifier, name, weights, epoch, before, kept=kept))
            promised[name] = max(shares, default=0.0)
        return promised

    def check(self, model: nn.Module) -> None:
        """Refuse a recipe that cannot be applied to a model as it says.

        Args:
            model: before quantization; not changed.

        Raises:
            RecipeError: the schedule is empty or ends too early, the recipe quantizes twice, a name or
                pattern matches no layer of the model, or SparseML cannot quantize the model.
        """
        if self.epochs <= 0:
            raise RecipeError(
                expected(f"the length of {self.name}", "more than 0 epochs", self.epochs, "Set num_epochs.")
            )
        self._check_schedule()
        for modifier in self._manager.iter_modifiers():
            for attribute, target in targets_of(modifier):
                check_target(attribute, target, model, f"{type(modifier).__name__} of {self.name}")
        for modifier in self._pruning():
            check_blocks(modifier, model, self.name)
        if self.quantization_start is not None:
            self._check_quantization(model)

    def _check_schedule(self) -> None:
        """Refuse quantization or pruning that the end of the recipe cuts off, and two quantizations."""
        ranges = [m.end_epoch for m in self._modifiers("EpochRangeModifier")]
        end = float(max(ranges, default=self.epochs))
        quantizers = self._modifiers("QuantizationModifier")
        if len(quantizers) > 1:
            raise RecipeError(
                f"{self.name} quantizes {len(quantizers)} times, and a model can be quantized only once. "
                "Keep one QuantizationModifier."
            )
        for modifier in quantizers:
            if start_of(modifier) >= end:
                do = "Make quantization_epochs smaller than num_epochs, and both more than 0."
                raise RecipeError(
                    expected("the start of quantization", f"below {end:g}", start_of(modifier), do)
                )
        for modifier in self._pruning():
            self._check_pruning(modifier, end)

    def _check_pruning(self, modifier: Any, end: float) -> None:
        kind = f"{type(modifier).__name__} of {self.name}"
        if start_of(modifier) >= end:
            do = "The recipe ends before it prunes: lengthen its EpochRangeModifier, or let it prune earlier."
            raise RecipeError(expected(f"the start of {kind}", f"below {end:g}", start_of(modifier), do))
        if float(modifier.end_epoch) > end and not type(modifier).__name__.startswith("Constant"):
            do = (
                "The recipe ends before the final sparsity is reached: lengthen its EpochRangeModifier, "
                "or let it prune earlier."
            )
            raise RecipeError(expected(f"the end of {kind}", f"at most {end:g}", modifier.end_epoch, do))

    def _check_quantization(self, model: nn.Module) -> None:
        """Quantize a copy of the model, to see that this works and that the right layers are quantized."""
        try:
            trial = self.apply_structure(deepcopy(model)).eval()
            with torch.no_grad():  # a wrapped module with several inputs fails only when it is called
                trial(torch.zeros(1, 3, 64, 64, device=next(model.parameters()).device))
        except Exception as error:  # SparseML and torch may raise anything for a model that they do not know
            types = "SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat"
            raise RecipeError(
                f"QuantizationModifier of {self.name} cannot be applied to this model "
                f"({first_line(error)}). Let it leave out all but convolutions: ignore: [{types}]."
            ) from error
        found, stem = quantized_layers(trial), getattr(model, "stem", None)
        if not found:
            raise RecipeError(
                f"QuantizationModifier of {self.name} quantizes no convolution of the model. "
                "Correct its ignore or submodules."
            )
        if stem and stem not in found:
            raise RecipeError(
                f"QuantizationModifier of {self.name} leaves {stem} in floating point, but the deployed "
                "graph reads 8-bit images. Correct its ignore or submodules."
            )

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        teacher: nn.Module | None = None,
    ) -> Sparsifier:
        """Begin to apply the recipe to a model in training.

        Args:
            model: in training mode.
            optimizer: of its parameters; a recipe's ``param_groups`` are indices into its groups.
            steps_per_epoch: optimizer steps in an epoch.
            teacher: for a recipe that distills: a detector for the same classes.

        Returns:
            The recipe at work, to be called at each step.

        Raises:
            RecipeError: the recipe distills, and there is no teacher, or it lacks a layer that is named.
        """
        if self.distills and teacher is None:
            raise RecipeError(
                f"The recipe {self.name} distills but has no teacher. Set recipe.teacher=PATH of a "
                "checkpoint with the same classes, or recipe.teacher=self."
            )
        manager = self._new_manager()
        for modifier in manager.iter_modifiers():
            if type(modifier).__name__ == "ConstantPruningModifier":
                # It looks for zeros when it begins, but not again before every step: the mask would be the
                # same, and that took a tenth of a training step of yolov5l. It still masks after each step.
                modifier._update_frequency = math.inf
        manager.initialize(model, epoch=0.0, loggers=_silent_logger())
        return ManagedSparsifier(
            manager,
            model,
            optimizer,
            steps_per_epoch,
            gradual=gradual_of(manager),
            quantization_start=self.quantization_start,
            distiller=self._distiller(model, teacher, optimizer) if teacher and self.distills else None,
        )

    def _distiller(
        self, student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Distiller:
        """The terms of all distillation modifiers, for a student and a teacher."""
        outputs, layers = [], []
        for m in self._modifiers("DistillationModifier"):
            if hasattr(m, "hardness"):
                outputs.append(OutputTerm(start_of(m), float(m.end_epoch), m.hardness, m.temperature))
            else:
                pairs = layer_pairs(m, student, teacher, self.name)
                options = (m.normalize, m.project_features, float(m.epsilon))
                layers.append(LayerTerm(start_of(m), float(m.end_epoch), m.gain, pairs, *options))
        return Distiller(student, teacher, outputs, layers, optimizer)

    def apply_structure(self, model: nn.Module) -> nn.Module:
        """Give a float model the structure that it has after the whole recipe, QAT modules included.

        Args:
            model: changed in place.

        Returns:
            The model itself.
        """
        was_training = model.training
        model.train()  # in evaluation mode torch would fold batch norms away instead of keeping them
        self._new_manager().apply_structure(model, epoch=float("inf"), loggers=_silent_logger())
        return model.train(was_training)

    def apply_at_once(self, model: YOLOv5, batches: Iterable[Tensor]) -> None:
        """Prune to the final sparsities and quantize, in place and without training.

        Args:
            model: the detector. Afterwards it is in evaluation mode and its quantizers are frozen; its batch
                norm statistics do not change.
            batches: float images (N, 3, H, W) in 0..1 whose activations set the quantizers' ranges.

        Raises:
            RecipeError: a modifier cannot prune without training.
        """
        for modifier in self._new_manager().iter_modifiers():
            if "Pruning" in type(modifier).__name__:
                self._prune_at_once(modifier, model)
        if self.quantization_start is None:
            model.eval()
            return
        self.apply_structure(model)
        model.eval().apply(torch.ao.quantization.enable_observer)
        pin_input_quantizer(model, model.stem)
        with torch.no_grad():
            for images in batches:
                model(images)
        freeze_quantizers(model)

    def _prune_at_once(self, modifier: Any, model: nn.Module) -> None:
        try:
            modifier.apply(model, epoch=float("inf"), loggers=_silent_logger())
        except Exception as error:  # SparseML raises plain Exceptions of many kinds
            raise RecipeError(
                f"{type(modifier).__name__} of {self.name} cannot prune at once ({first_line(error)}). "
                "Use MagnitudePruningModifier, or train with recipe.oneshot=false."
            ) from error

    def after(self, base: str) -> str:
        """Put this recipe after the one with which the start checkpoint was trained, as stages of one recipe.

        Args:
            base: text of the start checkpoint's recipe, with or without stages; empty if it has none. If both
                recipes quantize, its quantization is left out: a quantized start is refused, so the
                checkpoint is from before it.

        Returns:
            YAML of both, from which a checkpoint's structure can be rebuilt.

        Raises:
            RecipeError: ``base`` is no recipe.
        """
        if not base.strip():
            return self.text
        before = recipe_text(_load(body_of(base), "the recipe of the start checkpoint"))
        if self.quantization_start is not None:
            before = without(before, "QuantizationModifier")
        return _compose(before, self.text) if before else self.text

    def _new_manager(self) -> Any:
        """A manager for one use: SparseML's modifiers keep the state of the model they were applied to."""
        return _load(self.text, self.name)

    def _modifiers(self, kind: str) -> list[Any]:
        """The modifiers whose class's name ends with ``kind``."""
        return [m for m in self._manager.iter_modifiers() if type(m).__name__.endswith(kind)]

    def _pruning(self) -> list[Any]:
        return [m for m in self._manager.iter_modifiers() if "Pruning" in type(m).__name__]


def _load(body: str, name: str, variables: Mapping[str, float] | None = None) -> Any:
    """SparseML's manager of a recipe given as YAML."""
    try:
        manager = ScheduledModifierManager.from_yaml(f"{body}\n", recipe_variables=dict(variables or {}))
    except Exception as error:  # SparseML raises plain Exceptions of many kinds
        reason = first_line(error).rstrip(".")
        do = "Correct the file, or what recipe.variables sets (are the phases shorter than num_epochs?)."
        raise RecipeError(f"SparseML cannot read {name}: {reason}. {do}") from error
    for modifier in manager.iter_modifiers():
        if isinstance(getattr(modifier, "_submodules", None), set):
            modifier._submodules = sorted(modifier._submodules)  # a set has another order in every process
    return manager


def _check_kinds(kinds: Sequence[str], name: str) -> None:
    """Refuse modifiers of kinds that SparseML does not know."""
    tags = [tag for tag in yaml.SafeLoader.yaml_constructors if isinstance(tag, str)]
    known = [tag.removeprefix("!pytorch.") for tag in tags if tag.startswith("!pytorch.")]
    for kind in kinds:
        if kind.removeprefix("pytorch.") not in known:
            near = ", ".join(difflib.get_close_matches(kind, known, n=3, cutoff=0.3) or known[:3])
            raise RecipeError(
                f"{name} has a modifier {kind!r}, which SparseML does not know. "
                f"Correct it; the nearest names are {near}."
            )


def _promised_share(
    modifier: Any, layer: str, weights: int, epoch: float, before: float, *, kept: bool
) -> float:
    """The least share of zeros, 0..1, that a gradual modifier has given a layer by an epoch.

    Args:
        modifier: the modifier.
        layer: published name.
        weights: number of the layer's weights.
        epoch: a moment between two steps.
        before: the layer's share of zeros at epoch 0, 0..1.
        kept: whether zeros stay after the modifier has ended.
    """
    final = _final_sparsity(modifier, layer)
    start, end = start_of(modifier), float(modifier.end_epoch)
    if final is None or epoch <= start or (epoch >= end and not kept):
        return 0.0
    is_movement = isinstance(modifier, MovementPruningModifier)
    follows_curve = isinstance(modifier, GMPruningModifier) and not is_movement
    if epoch < end and not follows_curve:
        return 0.0
    initial = before if modifier.init_sparsity == FROM_PARAM_TOKEN else float(modifier.init_sparsity)
    # There is an update in every update_frequency epochs (-1: in every step), and one at the end.
    last = epoch if epoch >= end else max(start, epoch - max(0.0, modifier.update_frequency))
    share = _interpolate(last, start, end, initial, final, modifier.inter_func)
    group = group_size(modifier)
    return float(round(weights / group * share) * group / weights)


def _final_sparsity(modifier: Any, layer: str) -> float | None:
    """A gradual modifier's final sparsity of a layer; None if it has none for this layer alone."""
    per_layer = isinstance(modifier, BaseGradualPruningModifier) and not isinstance(modifier, _NOT_PER_LAYER)
    if not per_layer or modifier.global_sparsity:
        return None
    final = modifier.final_sparsity
    groups = final if isinstance(final, dict) else {final: modifier.params}
    for share, targets in groups.items():
        for target in [targets] if isinstance(targets, str) else targets:
            if matches_parameter(target, f"{layer}.weight"):
                return float(share)
    return None


def _compose(before: str, after: str) -> str:
    """Make two recipes stages of one; the epochs of the second are counted from the end of the first."""
    stages = stages_of(before)
    if stages and stages_of(after):
        after = renamed_stages(after, taken=stages)
    manager = ScheduledModifierManager.compose_staged(before, after)
    for modifier in manager.iter_modifiers():
        if type(modifier).__name__ == "QuantizationModifier":
            modifier._end_epoch = -1.0  # composing sets an end, with which this modifier cannot be read again
    return recipe_text(manager)


def _silent_logger() -> LoggerManager:
    """A logger that logs nothing; the default one writes sparse_logs/ into the current directory."""
    disabled = LambdaLogger(lambda *_: True, enabled=False)  # with no logger SparseML would use the default
    return LoggerManager([disabled], log_frequency=None, log_python=False)
