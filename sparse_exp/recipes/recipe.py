"""Recipes: read one, know its phases, apply it to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_exp.errors import RecipeError, expected
from sparse_exp.quantization.choice import AS_THE_RECIPE_SAYS, QuantizationChoice
from sparse_exp.quantization.quantizers import (
    begin,
    calibrate,
    freeze_quantizers,
    is_quantized,
    pin_input_quantizer,
    prepare,
    quantized_layers,
)
from sparse_exp.quantization.scheme import Schemes, layer_schemes
from sparse_exp.recipes.distillation import Distiller, terms_of
from sparse_exp.recipes.effects import effects_of, prune_at_once
from sparse_exp.recipes.language import (
    Tagged,
    body_of,
    check_variables,
    filled_in,
    read_body,
    set_anchored,
    to_yaml,
)
from sparse_exp.recipes.layer_patterns import check_target, layers_matching, matches_parameter, targets_of
from sparse_exp.recipes.modifiers import (
    ConstantPruningModifier,
    DistillationModifier,
    EpochRangeModifier,
    LearningRateFunctionModifier,
    MagnitudePruningModifier,
    Modifier,
    PerLayerDistillationModifier,
    QuantizationModifier,
    SlimmingModifier,
    check_blocks,
    in_order,
    make,
    stages_in_order,
)
from sparse_exp.recipes.schedule import in_stages, rescaled, staged, time_map, without
from sparse_exp.recipes.sparsifier import NativeSparsifier, Sparsifier
from sparse_exp.yolov5 import YOLOv5

__all__ = [
    "Phase",
    "Recipe",
    "Sparsifier",
    "freeze_quantizers",
    "is_quantized",
    "pin_input_quantizer",
    "quantized_layers",
]


@dataclass(frozen=True)
class Phase:
    """A part of a training in which pruning and quantization do not change their state.

    Attributes:
        name: ``dense`` (nothing is pruned yet, or ever), ``pruning`` (the sparsity is rising) or
            ``pruned`` (zeros are held), led by ``slimming`` where channels are being taken out and ``slim``
            afterwards, which stand alone where there are no zeros, followed by ``_quant`` where QAT runs. It
            is part of the name of the phase's checkpoint.
        start: first epoch; may be fractional.
        end: epoch at which it ends; may be fractional.
        quantized: whether QAT runs; then EMA and autocast are off.
    """

    name: str
    start: float
    end: float
    quantized: bool


class Recipe:
    """A recipe with its variables filled in.

    Args:
        text: the recipe, YAML or Markdown with YAML front matter.
        variables: values for root variables of the recipe; a variable that is None keeps its value.
        name: the recipe's name, for messages.
        num_epochs: length to which the whole schedule is stretched or squeezed (see
            `sparse_exp.recipes.schedule.time_map`), more than 0; None keeps its length.
        engine: what runs it: ``native``, or ``sparseml``, which has more kinds of modifiers.
        quantization: what of it the recipe leaves open.

    Attributes:
        name: as given.
        modifiers: in the order in which they act.
        quantization: as given.

    Raises:
        RecipeError: the text is no recipe, has no such variable, or has a modifier that the engine does not
            know.
    """

    def __init__(
        self,
        text: str,
        variables: Mapping[str, float | None] | None = None,
        name: str = "recipe",
        num_epochs: float | None = None,
        engine: str = "native",
        quantization: QuantizationChoice = AS_THE_RECIPE_SAYS,
    ) -> None:
        self.name, self._engine, self.quantization = name, engine, quantization
        body = body_of(text)
        check_variables(read_body(body, name), variables or {}, name)
        given = {key: value for key, value in (variables or {}).items() if value is not None}
        self._set(filled_in(read_body(set_anchored(body, given), name), given, name))
        if num_epochs is not None and self.epochs > 0:
            boundaries = [0.0, *(phase.end for phase in self.phases())]
            new = rescaled(self.text, time_map(boundaries, num_epochs))
            self._set(filled_in(read_body(new, name), {}, name))

    def _set(self, stages: Mapping[str, list[Tagged]]) -> None:
        made = {stage: in_order(self._made(data) for data in listed) for stage, listed in stages.items()}
        self._stages = stages_in_order(made)
        self.modifiers = [modifier for listed in self._stages.values() for modifier in listed]

    def _made(self, data: Tagged) -> Modifier:
        by_sparseml = self._engine == "sparseml"
        modifier = make(data, self.name, others=by_sparseml)
        if by_sparseml and isinstance(modifier, QuantizationModifier):
            return replace(modifier, options=self.quantization.written_into(modifier.options))
        return modifier

    @classmethod
    def from_file(
        cls,
        path: Path,
        variables: Mapping[str, float | None] | None = None,
        num_epochs: float | None = None,
        engine: str = "native",
        quantization: QuantizationChoice = AS_THE_RECIPE_SAYS,
    ) -> Recipe:
        """Read a recipe from a file: ``.md`` with front matter, or ``.yaml``.

        Args:
            path: the file.
            variables: see `Recipe`.
            num_epochs: see `Recipe`.
            engine: see `Recipe`.
            quantization: see `Recipe`.

        Raises:
            RecipeError: the file cannot be read, or see `Recipe`.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"Cannot read the recipe {path}: {error}. Check recipe.file.") from error
        return cls(text, variables, path.name, num_epochs, engine, quantization)

    @property
    def text(self) -> str:
        """The recipe with its variables filled in, as YAML."""
        return to_yaml(in_stages({stage: [m.as_data() for m in ms] for stage, ms in self._stages.items()}))

    @property
    def epochs(self) -> float:
        """Length of the training in epochs."""
        return max(max(m.start_epoch, m.end_epoch) for m in self.modifiers)

    @property
    def quantization_start(self) -> float | None:
        """Epoch at which QAT begins; None for a recipe without quantization."""
        return min((m.start for m in self._quantizations()), default=None)

    @property
    def prunes(self) -> bool:
        """Whether the recipe makes zeros or keeps those of the start."""
        return any(m.prunes for m in self.modifiers)

    @property
    def prunes_gradually(self) -> bool:
        """Whether the recipe makes zeros while it trains."""
        return any(m.gradual for m in self.modifiers)

    @property
    def pruning_end(self) -> float | None:
        """Epoch at which the last gradual modifier reaches its final sparsity; None without any."""
        return max((m.end_epoch for m in self.modifiers if m.gradual), default=None)

    @property
    def holds_mask(self) -> bool:
        """Whether the recipe only keeps the zeros of the start, and makes none."""
        held = any(isinstance(m, ConstantPruningModifier) for m in self.modifiers)
        return held and not self.prunes_gradually

    @property
    def slimming(self) -> SlimmingModifier | None:
        """The modifier that takes channels out; None: there is none."""
        return next((m for m in self.modifiers if isinstance(m, SlimmingModifier)), None)

    @property
    def distillation_start(self) -> float | None:
        """Epoch from which a teacher is needed; None for a recipe without one."""
        kinds = (DistillationModifier, PerLayerDistillationModifier)
        return min((m.start for m in self.modifiers if isinstance(m, kinds)), default=None)

    @property
    def distills(self) -> bool:
        """Whether the recipe needs a teacher."""
        return self.distillation_start is not None

    @property
    def sets_learning_rate(self) -> bool:
        """Whether the recipe's modifiers replace the trainer's own learning-rate schedule."""
        return any(m.sets_rate for m in self.modifiers)

    def phases(self) -> list[Phase]:
        """The phases of the training, in order."""
        gradual = [(m.start, m.end_epoch) for m in self.modifiers if m.gradual]
        first_zeros = min((m.start for m in self.modifiers if m.prunes), default=self.epochs)
        quantization, slimming = self.quantization_start, self.slimming
        cuts = {
            0.0,
            self.epochs,
            first_zeros,
            quantization or 0.0,
            *(cut for span in gradual for cut in span),
            *((slimming.start, slimming.end_epoch) if slimming else ()),
        }
        inside = sorted(cut for cut in cuts if 0.0 <= cut <= self.epochs)
        phases: list[Phase] = []
        for start, end in pairwise(inside):
            rising = any(first <= start < last for first, last in gradual)
            name = "pruning" if rising else "pruned" if start >= first_zeros else "dense"
            if slimming and start >= slimming.start:
                slim = "slim" if start >= slimming.end_epoch else "slimming"
                name = slim if name == "dense" else f"{slim}_{name}"
            quantized = quantization is not None and start >= quantization
            name += "_quant" if quantized else ""
            if phases and phases[-1].name == name:
                start = phases.pop().start
            phases.append(Phase(name, start, end, quantized))
        return phases

    @property
    def warmup(self) -> float:
        """Epochs over which the recipe lets the learning rate rise at the start; 0 where it does not."""
        rising = (
            modifier.end_epoch
            for modifier in self.modifiers
            if isinstance(modifier, LearningRateFunctionModifier)
            and modifier.start <= 0
            and modifier.lr_func == "linear"
            and modifier.init_lr < modifier.final_lr
        )
        return max(rising, default=0.0)

    def learning_rates(self, phase: Phase) -> list[tuple[float, float]]:
        """(first, last) learning rate within a phase for each modifier that acts in it, in order.

        Where none acts, the rate that was last set before the phase continues.
        """
        modifiers = sorted((m for m in self.modifiers if m.sets_rate), key=lambda m: m.start)
        acting = [_rates(m, phase) for m in modifiers if _overlaps(m, phase)]
        before = [m for m in modifiers if m.start < phase.start]
        if not acting and before:
            last = before[-1].rate_at(phase.start)
            return [(last, last)]
        return acting

    def matches(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers on which each modifier that names layers acts.

        Args:
            model: not changed.

        Returns:
            For each such modifier, by its kind (numbered if there are several of a kind), the published names
            of its layers in the model's order.
        """
        found: list[tuple[str, list[str]]] = []
        for modifier in self.modifiers:
            pairs = list(targets_of(modifier))
            if isinstance(modifier, QuantizationModifier):
                schemes = layer_schemes(modifier.arguments, model)
                found.append((modifier.kind, [name for name, scheme in schemes.items() if scheme.weights]))
            elif pairs:
                layers = {layer for pair in pairs for layer in layers_matching(*pair, model)}
                order = [name for name, _ in model.named_modules()]
                found.append((modifier.kind, sorted(layers, key=order.index)))
        kinds = [kind for kind, _ in found]
        labels = [
            kind if kinds.count(kind) == 1 else f"{kind} {kinds[:index].count(kind) + 1}"
            for index, kind in enumerate(kinds)
        ]
        return dict(zip(labels, (layers for _, layers in found), strict=True))

    def expected_sparsity(self, model: YOLOv5, epoch: float, start: Mapping[str, float]) -> dict[str, float]:
        """The least share of zeros that the recipe promises for each prunable convolution at an epoch.

        A layer whose zeros are held keeps the share that it started with. A layer pruned by magnitude has the
        sparsity of the last update that must have happened by then. Pruning of all layers as one promises
        nothing for a layer.

        Args:
            model: the detector, before or after quantization.
            epoch: a moment between two steps; 0 is before the first step.
            start: shares of zeros at epoch 0 by the layers' published names, 0..1.

        Returns:
            Shares of zeros by the layers' published names, 0..1.
        """
        held = [m for m in self.modifiers if isinstance(m, ConstantPruningModifier)]
        promised = {}
        for name, conv in model.prunable_convolutions().items():
            before = start.get(name, 0.0)
            shares = [before for m in held if _holds(m, name, epoch)]
            for m in self.modifiers:
                final = _final_sparsity(m, name)
                if isinstance(m, MagnitudePruningModifier) and final is not None:
                    kept = m.leave_enabled or any(_holds(h, name, epoch, at=m.end_epoch) for h in held)
                    shares.append(m.promised(conv.weight.shape, final, epoch, before, kept=kept))
            promised[name] = max(shares, default=0.0)
        return promised

    def aimed_sparsity(self, model: YOLOv5, epoch: float, start: Mapping[str, float]) -> dict[str, float]:
        """The share of zeros that the recipe aims at in each prunable convolution at an epoch.

        It is what `expected_sparsity` promises. Layers that are pruned as one, of which none is promised
        anything, share their zeros evenly here: in sum it is right. Arguments and result are as there.
        """
        aimed = self.expected_sparsity(model, epoch, start)
        held = [m for m in self.modifiers if isinstance(m, ConstantPruningModifier)]
        for m in self.modifiers:
            if not isinstance(m, MagnitudePruningModifier) or not m.together:
                continue
            ((final, targets),) = m.targets
            names = [n for n in aimed if any(matches_parameter(target, f"{n}.weight") for target in targets)]
            for name in names:
                kept = m.leave_enabled or any(_holds(h, name, epoch, at=m.end_epoch) for h in held)
                share = m.promised((1_000_000,), final, epoch, 0.0, kept=kept)
                aimed[name] = max(aimed[name], share)
        return aimed

    def check(self, model: nn.Module) -> None:
        """Refuse a recipe that cannot be applied to a model as it says.

        Args:
            model: not changed.

        Raises:
            RecipeError: the schedule is empty or ends too early, the recipe quantizes twice, a name or
                pattern matches no layer of the model, or the model cannot be quantized like this.
        """
        if self.epochs <= 0:
            raise RecipeError(
                expected(f"the length of {self.name}", "more than 0 epochs", self.epochs, "Set num_epochs.")
            )
        self._check_schedule()
        for modifier in self.modifiers:
            for attribute, target in targets_of(modifier):
                check_target(attribute, target, model, f"{modifier.kind} of {self.name}")
            if modifier.prunes:
                layers = [layer for pair in targets_of(modifier) for layer in layers_matching(*pair, model)]
                check_blocks(modifier, layers, model, self.name)
        if self.quantization_start is not None:
            self._check_quantization(model)

    def _check_schedule(self) -> None:
        """Refuse quantization or pruning that the end of the recipe cuts off, and two quantizations."""
        ranges = [m.end_epoch for m in self.modifiers if isinstance(m, EpochRangeModifier)]
        end = max(ranges, default=self.epochs)
        quantizations = self._quantizations()
        if len(quantizations) > 1:
            raise RecipeError(
                f"{self.name} quantizes {len(quantizations)} times, and a model can be quantized only once. "
                "Keep one QuantizationModifier."
            )
        start = self.quantization_start
        if start is not None and start >= end:
            do = "Make quantization_epochs smaller than num_epochs, and both more than 0."
            raise RecipeError(expected("the start of quantization", f"below {end:g}", start, do))
        for modifier in self.modifiers:
            if modifier.prunes:
                self._check_pruning(modifier, end)
        if self.slimming is not None:
            self._check_slimming(self.slimming, end)

    def _check_slimming(self, slimming: SlimmingModifier, end: float) -> None:
        """Refuse what cannot be done to a network whose channels are still to go, or with another engine."""
        kind, last = f"SlimmingModifier of {self.name}", slimming.end_epoch
        if self._engine == "sparseml":
            raise RecipeError(
                f"{self.name} has a SlimmingModifier, which SparseML does not know. Set recipe.engine=native."
            )
        if sum(isinstance(m, SlimmingModifier) for m in self.modifiers) > 1:
            raise RecipeError(f"{self.name} has several SlimmingModifiers. Keep one, and set its steps.")
        if last >= end:
            do = "Let it end earlier, or lengthen the EpochRangeModifier."
            raise RecipeError(expected(f"the end of {kind}", f"below {end:g}", last, do))
        for m in self.modifiers:
            late = isinstance(m, QuantizationModifier | PerLayerDistillationModifier) or m.gradual
            if late and m.start < last:
                do = "Let it begin when all channels are gone: it keeps numbers for each of them."
                raise RecipeError(
                    expected(f"the start of {m.kind} of {self.name}", f"at least {last:g}", m.start, do)
                )

    def _check_pruning(self, modifier: Modifier, end: float) -> None:
        kind = f"{modifier.kind} of {self.name}"
        if modifier.start >= end:
            do = "The recipe ends before it prunes: lengthen its EpochRangeModifier, or let it prune earlier."
            raise RecipeError(expected(f"the start of {kind}", f"below {end:g}", modifier.start, do))
        if modifier.gradual and modifier.end_epoch > end:
            do = (
                "The recipe ends before the final sparsity is reached: lengthen its EpochRangeModifier, "
                "or let it prune earlier."
            )
            raise RecipeError(expected(f"the end of {kind}", f"at most {end:g}", modifier.end_epoch, do))

    def _check_quantization(self, model: nn.Module) -> None:
        """See that the right layers would be quantized."""
        try:
            schemes, stem = self._schemes(model), getattr(model, "stem", None)
        except RecipeError as error:
            raise RecipeError(
                f"QuantizationModifier of {self.name} cannot be applied to this model: {error}"
            ) from error
        found = [name for name, scheme in schemes.items() if scheme.weights]
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

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put the quantizers that the recipe will switch on into a model, switched off.

        Args:
            model: changed in place, before an optimizer or an average of it is made. Where it has these
                quantizers already, it stays as it is.

        Returns:
            The model itself; as it was where SparseML runs the recipe, which puts in its own when QAT begins.
        """
        return model if self._engine == "sparseml" else prepare(model, self._schemes(model))

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        teacher: nn.Module | None = None,
    ) -> Sparsifier:
        """Begin to apply the recipe to a model in training.

        Args:
            model: in training mode. Quantizers are put into it where `prepare` has not done so.
            optimizer: of its parameters; a recipe's ``param_groups`` are indices into its groups.
            steps_per_epoch: optimizer steps in an epoch.
            teacher: for a recipe that distills: a detector for the same classes.

        Returns:
            The recipe at work, to be called at each step.

        Raises:
            RecipeError: the recipe distills, and there is no teacher, or it lacks a layer that is named; or
                the model or the optimizer lacks what a modifier names.
        """
        if self.distills and teacher is None:
            raise RecipeError(
                f"The recipe {self.name} distills but has no teacher. Set recipe.teacher=PATH of a "
                "checkpoint with the same classes, or recipe.teacher=self."
            )
        self.prepare(model)
        distiller = None
        if teacher and self.distills:
            terms = terms_of(self.modifiers, model, teacher, self.name)
            distiller = Distiller(model, teacher, *terms, optimizer)
        if self._engine == "sparseml":
            from sparse_exp.recipes.sparseml import SparsemlSparsifier, manager_of  # may not be installed

            manager = manager_of(self.text, self.name)
            return SparsemlSparsifier(manager, model, optimizer, steps_per_epoch, distiller)
        effects = effects_of(self.modifiers, model, optimizer, steps_per_epoch, self.name)
        return NativeSparsifier(effects, optimizer, steps_per_epoch, distiller)

    def apply_structure(self, model: nn.Module) -> nn.Module:
        """Give a float model the structure that it has after the whole recipe: quantizers, switched on.

        Args:
            model: changed in place.

        Returns:
            The model itself.
        """
        return begin(prepare(model, self._schemes(model)))

    def apply_at_once(self, model: YOLOv5, batches: Iterable[Tensor]) -> None:
        """Prune to the final sparsities and quantize, in place and without training.

        Args:
            model: the detector. Afterwards it is in evaluation mode and its quantizers are frozen; its batch
                norm statistics do not change.
            batches: float images (N, 3, H, W) in 0..1 whose activations set the quantizers' ranges.

        Raises:
            RecipeError: a modifier cannot prune the model.
        """
        if self._engine == "sparseml":
            from sparse_exp.recipes.sparseml import apply_at_once  # may not be installed

            apply_at_once(self.text, self.name, model)
        else:
            for modifier in self.modifiers:
                if isinstance(modifier, MagnitudePruningModifier):
                    prune_at_once(modifier, model, self.name)
        model.eval()
        if self.quantization_start is not None:
            calibrate(self.apply_structure(model), batches)
            freeze_quantizers(model)

    def after(self, base: str) -> str:
        """Put this recipe after the one with which the start checkpoint was trained, as stages of one recipe.

        Args:
            base: text of the start checkpoint's recipe, with or without stages; empty if it has none. It may
                have modifiers that only SparseML runs. Its quantization is left out: of a quantized start
                only the weights are taken, in floating point.

        Returns:
            YAML of both.

        Raises:
            RecipeError: ``base`` is no recipe.
        """
        if not base.strip():
            return self.text
        start = Recipe(base, name="the recipe of the start checkpoint", engine="sparseml")
        before = without(start.text, "QuantizationModifier")
        return Recipe(staged(before, self.text), engine="sparseml").text if before else self.text

    def _quantizations(self) -> list[QuantizationModifier]:
        return [m for m in self.modifiers if isinstance(m, QuantizationModifier)]

    def _schemes(self, model: nn.Module) -> Schemes:
        """What of a model the recipe quantizes; nothing without a QuantizationModifier."""
        for modifier in self._quantizations():
            schemes = layer_schemes(modifier.arguments, model)
            return self.quantization.applied_to(schemes, modifier.arguments, model)
        return {}


def _overlaps(modifier: Modifier, phase: Phase) -> bool:
    """Whether a modifier begins in a phase, or began before and ends after the phase's start."""
    return phase.start <= modifier.start < phase.end or modifier.start < phase.start < modifier.end_epoch


def _rates(modifier: Modifier, phase: Phase) -> tuple[float, float]:
    """First and last learning rate that a modifier sets within a phase; see `_overlaps`."""
    end = phase.end if modifier.end_epoch < 0 else min(phase.end, modifier.end_epoch)
    return modifier.rate_at(max(phase.start, modifier.start)), modifier.rate_at(end)


def _holds(modifier: ConstantPruningModifier, layer: str, epoch: float, at: float = 0.0) -> bool:
    """Whether a modifier holds at an epoch the zeros that a layer had at an earlier one."""
    names = any(matches_parameter(target, f"{layer}.weight") for _, target in targets_of(modifier))
    return names and modifier.start <= at and (modifier.end_epoch < 0 or epoch <= modifier.end_epoch)


def _final_sparsity(modifier: Any, layer: str) -> float | None:
    """A modifier's final sparsity of a layer; None where it has none for this layer alone."""
    if not isinstance(modifier, MagnitudePruningModifier) or modifier.together:
        return None
    for share, targets in modifier.targets:
        if any(matches_parameter(target, f"{layer}.weight") for target in targets):
            return share
    return None
