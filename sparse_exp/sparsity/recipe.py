"""The one door to SparseML: reading a recipe, knowing its phases, applying it to a model.

SparseML ended in June 2025. What the rest of the project needs of it is the small interface of
`Recipe` and `Sparsifier`, so that it can be replaced here.
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
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from sparse_exp.errors import RecipeError, expected, first_line
from sparse_exp.sparsity.distillation import Distiller, LayerTerm, OutputTerm
from sparse_exp.sparsity.modifiers import (
    Phase,
    check_blocks,
    gradual_of,
    group_size,
    holds,
    layer_pairs,
    overlaps,
    rate_at,
    rates,
    start_of,
    text_of,
)
from sparse_exp.sparsity.quantizers import (
    freeze_quantizers,
    is_quantized,
    pin_input_quantizer,
    quantized_layers,
)
from sparse_exp.sparsity.schedule import (
    body_of,
    check_variables,
    modifiers_of,
    read_body,
    renamed_stages,
    rescaled,
    stages_of,
    time_map,
    with_anchors,
    without,
)
from sparse_exp.sparsity.sparsifier import ManagedSparsifier, Sparsifier
from sparse_exp.sparsity.targets import (
    check_target,
    layers_matching,
    names_parameter,
    targets_of,
)

if TYPE_CHECKING:
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
    """A QConfig that takes attributes: SparseML hangs its scheme on it, which torch's no longer allows."""


def _qconfig(activation: Any, weight: Any) -> _QConfig:
    observers = [args.get_observer() if args else nn.Identity for args in (activation, weight)]
    return _QConfig(activation=observers[0], weight=observers[1])  # type: ignore[no-untyped-call]


def _interpolate(now: float, start: float, end: float, *values: Any) -> float:
    # SparseML's own gives the first value, or a complex number, where a step lies behind the end.
    return float(interpolate(min(max(now, start), end), start, end, *values))


quantization_scheme._get_qconfig = _qconfig
modifier_pruning_base.interpolate = _interpolate

logging.getLogger("sparseml").setLevel(logging.WARNING)
# It warns that it has no teacher: distillation is ours (see `Distiller`).
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
        variables: values for root variables of the recipe; those that are None are left as they are.
        name: what to call it in messages.
        num_epochs: length to which the whole schedule is stretched or squeezed (see
            `sparse_exp.sparsity.schedule.time_map`), more than 0; None keeps it.

    Raises:
        RecipeError: the text is no recipe, or a variable is not one of its root variables.
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
        self._manager = _load(with_anchors(body, given), name, given)
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
        """Read a recipe file (``.md`` with front matter, or ``.yaml``)."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"Cannot read the recipe {path}: {error}. Check recipe.file.") from error
        return cls(text, variables, name=path.name, num_epochs=num_epochs)

    def __reduce__(self) -> tuple[type[Recipe], tuple[str, None, str]]:
        """A recipe goes to another process as its text: SparseML's objects do not."""
        return type(self), (self.text, None, self.name)

    @property
    def text(self) -> str:
        """The recipe as it runs, as YAML that SparseML reads back."""
        return text_of(self._manager)

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
        """Whether the recipe holds or makes zeros."""
        return bool(self._pruning())

    @property
    def prunes_gradually(self) -> bool:
        """Whether the recipe makes zeros while it trains."""
        return bool(gradual_of(self._manager))

    @property
    def pruning_end(self) -> float | None:
        """Epoch at which the last gradual modifier reaches its final sparsity; None: there is none."""
        ends = [float(m.end_epoch) for m in gradual_of(self._manager)]
        return max(ends) if ends else None

    @property
    def holds_mask(self) -> bool:
        """Whether the recipe only keeps zeros that are there from the start."""
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
        """(first, last) learning rate within the phase of each modifier that acts in it, in order.

        Where none does, the last rate that was set before it goes on.
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
        """The layers that each modifier which names some acts on, by their published names.

        Args:
            model: before quantization; left as it is.

        Returns:
            For each such modifier, in the order in which they begin, its kind (numbered where there are
            several of one) and the names in the model's order.
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
        """The least share of zeros that the recipe promises for each prunable convolution.

        A held layer keeps what it started with. A layer that magnitude prunes has the sparsity of the last
        update that must have happened by then; other kinds of pruning promise nothing before their end.

        Args:
            model: the detector, before or after quantization.
            epoch: a moment between two steps; 0 is before the first.
            start: shares at epoch 0 by the layers' published names, 0..1.

        Returns:
            By the layers' published names, 0..1.
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
                shares.append(_promise(modifier, name, weights, epoch, before, kept=kept))
            promised[name] = max(shares, default=0.0)
        return promised

    def check(self, model: nn.Module) -> None:
        """Refuse a recipe that cannot do to this model what it says.

        Args:
            model: before quantization; left as it is.

        Raises:
            RecipeError: the schedule is empty or ends too early, something is quantized twice, a modifier
                names no layer of the model (the nearest names are given), or SparseML cannot quantize it.
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
            self._try_structure(model)

    def _check_schedule(self) -> None:
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

    def _try_structure(self, model: nn.Module) -> None:
        try:
            trial = self.apply_structure(deepcopy(model)).eval()
            with torch.no_grad():  # a wrapped module of several inputs fails only when it is called
                trial(torch.zeros(1, 3, 64, 64, device=next(model.parameters()).device))
        except Exception as error:  # whatever SparseML and torch meet in a model that they do not know
            types = "SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat"
            raise RecipeError(
                f"QuantizationModifier of {self.name} cannot be applied to this model "
                f"({first_line(error)}). Let it leave out what is no convolution: ignore: [{types}]."
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
            teacher: a detector for the same classes, for a recipe that distills.

        Raises:
            RecipeError: the recipe distills and there is no teacher, or it lacks a layer that is named.
        """
        if self.distills and teacher is None:
            raise RecipeError(
                f"The recipe {self.name} distills but has no teacher. Set recipe.teacher=PATH of a "
                "checkpoint with the same classes, or recipe.teacher=self."
            )
        manager = self._fresh()
        _mask_once(manager)
        manager.initialize(model, epoch=0.0, loggers=_silent())
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
        """Bring a float model into the structure it has after the whole recipe (QAT modules and all)."""
        was_training = model.training
        model.train()  # in evaluation mode torch would fold batch norms away instead of keeping them
        self._fresh().apply_structure(model, epoch=float("inf"), loggers=_silent())
        return model.train(was_training)

    def apply_at_once(self, model: YOLOv5, batches: Iterable[Tensor]) -> None:
        """Prune to the final sparsities and quantize, without training, in place.

        Args:
            model: the detector; left in evaluation mode, its quantizers frozen. Batch norm statistics
                stay as they are.
            batches: float images (N, 3, H, W) in 0..1 whose activations set the quantizers' ranges.

        Raises:
            RecipeError: a kind of pruning needs training.
        """
        manager = self._fresh()
        for modifier in manager.iter_modifiers():
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
            modifier.apply(model, epoch=float("inf"), loggers=_silent())
        except Exception as error:  # SparseML raises plain Exceptions of many kinds
            raise RecipeError(
                f"{type(modifier).__name__} of {self.name} cannot prune at once ({first_line(error)}). "
                "Use MagnitudePruningModifier, or train with recipe.oneshot=false."
            ) from error

    def after(self, base: str) -> str:
        """The recipe staged behind the one that the start checkpoint was made with.

        Args:
            base: text of that recipe, itself staged or not; empty where there is none. Where both
                quantize, the checkpoint is from before that (a quantized start is refused), and its
                recipe's quantization is left out.

        Returns:
            YAML of both, from which a checkpoint's structure can be rebuilt.

        Raises:
            RecipeError: ``base`` is no recipe.
        """
        if not base.strip():
            return self.text
        before = text_of(_load(body_of(base), "the recipe of the start checkpoint"))
        if self.quantization_start is not None:
            before = without(before, "QuantizationModifier")
        return _compose(before, self.text) if before else self.text

    def _fresh(self) -> Any:
        """A manager of its own for each use: SparseML's modifiers remember what they have done."""
        return _load(self.text, self.name)

    def _modifiers(self, name: str) -> list[Any]:
        return [m for m in self._manager.iter_modifiers() if type(m).__name__.endswith(name)]

    def _pruning(self) -> list[Any]:
        return [m for m in self._manager.iter_modifiers() if "Pruning" in type(m).__name__]


def _load(body: str, name: str, variables: Mapping[str, float] | None = None) -> Any:
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


def _mask_once(manager: Any) -> None:
    """Let a modifier that holds zeros look for them when it begins, and not again before every step.

    The mask would be the same; to make it anew took SparseML a tenth of a training step of yolov5l. It goes
    on being applied after each step.
    """
    for modifier in manager.iter_modifiers():
        if type(modifier).__name__ == "ConstantPruningModifier":
            modifier._update_frequency = math.inf


def _check_kinds(kinds: Sequence[str], name: str) -> None:
    tags = [tag for tag in yaml.SafeLoader.yaml_constructors if isinstance(tag, str)]
    known = [tag.removeprefix("!pytorch.") for tag in tags if tag.startswith("!pytorch.")]
    for kind in kinds:
        if kind.removeprefix("pytorch.") not in known:
            near = ", ".join(difflib.get_close_matches(kind, known, n=3, cutoff=0.3) or known[:3])
            raise RecipeError(
                f"{name} has a modifier {kind!r}, which SparseML does not know. "
                f"Correct it; the nearest names are {near}."
            )


def _promise(modifier: Any, layer: str, weights: int, epoch: float, before: float, *, kept: bool) -> float:
    """The least sparsity, 0..1, that a gradual modifier has given a layer by an epoch."""
    final = _final_sparsity(modifier, layer)
    start, end = start_of(modifier), float(modifier.end_epoch)
    if final is None or epoch <= start or (epoch >= end and not kept):
        return 0.0
    if epoch < end and not _ramps(modifier):
        return 0.0
    initial = before if modifier.init_sparsity == FROM_PARAM_TOKEN else float(modifier.init_sparsity)
    # Updates come in every update_frequency epochs (-1: in every step), and surely the final one.
    last = epoch if epoch >= end else max(start, epoch - max(0.0, modifier.update_frequency))
    share = _interpolate(last, start, end, initial, final, modifier.inter_func)
    group = group_size(modifier)
    return float(round(weights / group * share) * group / weights)


def _ramps(modifier: Any) -> bool:
    """Whether the sparsity rises as the interpolation says."""
    return isinstance(modifier, GMPruningModifier) and not isinstance(modifier, MovementPruningModifier)


def _final_sparsity(modifier: Any, layer: str) -> float | None:
    """What a gradual modifier prunes a layer to; None where it does not say, or does not mean the layer."""
    per_layer = isinstance(modifier, BaseGradualPruningModifier) and not isinstance(modifier, _NOT_PER_LAYER)
    if not per_layer or modifier.global_sparsity:
        return None
    final = modifier.final_sparsity
    groups = final if isinstance(final, dict) else {final: modifier.params}
    for share, targets in groups.items():
        for target in [targets] if isinstance(targets, str) else targets:
            if names_parameter(target, f"{layer}.weight"):
                return float(share)
    return None


def _compose(before: str, after: str) -> str:
    """Stage one recipe behind another, the epochs of the second counted on from the end of the first."""
    stages = stages_of(before)
    if stages and stages_of(after):
        after = renamed_stages(after, taken=stages)
    manager = ScheduledModifierManager.compose_staged(before, after)
    for modifier in manager.iter_modifiers():
        if type(modifier).__name__ == "QuantizationModifier":
            modifier._end_epoch = -1.0  # composing closes open ends, which this modifier cannot read back
    return text_of(manager)


def _silent() -> LoggerManager:
    """A logger that keeps quiet: the default one writes sparse_logs/ into the current directory."""
    nobody = LambdaLogger(lambda *_: True, enabled=False)  # an empty manager would count as none given
    return LoggerManager([nobody], log_frequency=None, log_python=False)
