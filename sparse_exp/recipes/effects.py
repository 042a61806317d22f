"""What modifiers do to a model and its optimizer, step by step, at the moments of SparseML 1.8."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from sparse_exp.errors import RecipeError, expected
from sparse_exp.quantization.quantizers import begin, freeze_batch_norms, freeze_quantizers
from sparse_exp.recipes.layer_patterns import parameters_matching
from sparse_exp.recipes.masks import magnitude_masks, sparsity_of
from sparse_exp.recipes.modifiers import (
    FROM_PARAM,
    ConstantPruningModifier,
    LearningRateFunctionModifier,
    LearningRateModifier,
    MagnitudePruningModifier,
    Modifier,
    QuantizationModifier,
    SetLearningRateModifier,
    SetParamModifier,
    SetWeightDecayModifier,
    TrainableParamsModifier,
    as_list,
)
from sparse_exp.recipes.rates import decays, warm_restarts
from sparse_exp.yolov5.channels import Cut

_ModifierT = TypeVar("_ModifierT", bound=Modifier)
_EPSILON = 2.0**-52
Named = tuple[str, nn.Parameter]


class Effect(Generic[_ModifierT]):
    """A modifier at work. It acts when it begins and when it ends, and in between as often as it says.

    Args:
        modifier: what is to happen.
        model: in training.
        optimizer: of its parameters.
        steps_per_epoch: optimizer steps in an epoch.
        recipe: the recipe's name, for messages.

    Raises:
        RecipeError: the model or the optimizer lacks what the modifier names.
    """

    data: ClassVar[tuple[str, ...]] = ("begun", "ended", "last")
    """Attributes with builtin types that make up its progress."""

    def __init__(
        self,
        modifier: _ModifierT,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        recipe: str,
    ) -> None:
        self.modifier, self._model, self._optimizer = modifier, model, optimizer
        self._steps, self._recipe = steps_per_epoch, recipe
        self.begun, self.ended, self.last = False, False, -1.0
        self._attach()

    def _attach(self) -> None:
        """Find in the model and the optimizer what the modifier names."""

    def _act(self, epoch: float, *, begins: bool, ends: bool) -> None:
        """Do what is due at an epoch."""

    @property
    def _frequency(self) -> float | None:
        """Epochs between two updates; -1: in every step; None: only when it begins and ends."""
        return None

    def _begins(self, epoch: float) -> bool:
        start = self.modifier.start_epoch
        return not self.begun and not self.ended and (start == -1.0 or epoch >= start)

    def _ends(self, epoch: float) -> bool:
        return self.begun and not self.ended and epoch >= self.modifier.end_epoch >= 0.0

    def _repeats(self, epoch: float) -> bool:
        frequency = self._frequency
        if frequency is None or not self.begun or self.ended or epoch <= self.modifier.start_epoch:
            return False
        return frequency == -1.0 or (self.last >= 0.0 and epoch >= self.last + frequency)

    def update(self, epoch: float) -> None:
        """Act if something is due at an epoch."""
        begins = self._begins(epoch)
        if begins or self._ends(epoch) or self._repeats(epoch):
            self.last = epoch
            self._act(epoch, begins=begins, ends=self._ends(epoch))
            self.begun = self.begun or begins
            self.ended = self._ends(epoch) or self.ended

    def mask(self) -> None:
        """Set weights to 0 that are to be 0."""

    def state(self) -> dict[str, Any]:
        """Its progress as builtin types and tensors."""
        return {name: getattr(self, name) for name in self.data}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where another effect of the same modifier was.

        Args:
            state: of the other one.
        """
        for name in self.data:
            setattr(self, name, state[name])

    def cut(self, cuts: Mapping[str, Cut]) -> None:
        """Follow a model that lost channels.

        Args:
            cuts: what stayed of its parameters, by name.
        """

    def finish(self) -> None:
        """Detach from the model."""

    def _groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer that the modifier's ``param_groups`` name; none means all."""
        groups, chosen = self._optimizer.param_groups, self.modifier.arguments.get("param_groups")
        return [group for index, group in enumerate(groups) if not chosen or index in chosen]

    def _check_groups(self) -> None:
        last = max(self.modifier.arguments.get("param_groups") or [0])
        count = len(self._optimizer.param_groups)
        if last >= count:
            what = f"param_groups of {self.modifier.kind} of {self._recipe}"
            raise RecipeError(expected(what, f"below {count}", last, "Correct the recipe."))

    def _parameters(self, targets: Sequence[str], *, strict: bool = True) -> list[Named]:
        found = parameters_matching(targets, self._model)
        if strict and not found:
            raise RecipeError(
                f"{self.modifier.kind} of {self._recipe} matches no parameter of the model. "
                f"Correct its {', '.join(targets)}."
            )
        return found


class SetRate(Effect[SetLearningRateModifier]):
    """Sets the learning rate once."""

    def _attach(self) -> None:
        self._check_groups()

    def _act(self, epoch: float, *, begins: bool, ends: bool) -> None:
        for group in self._groups() if begins else ():
            group["lr"] = self.modifier.learning_rate


class SetDecay(Effect[SetWeightDecayModifier]):
    """Sets the weight decay once."""

    def _attach(self) -> None:
        self._check_groups()

    def _act(self, epoch: float, *, begins: bool, ends: bool) -> None:
        for group in self._groups() if begins else ():
            group["weight_decay"] = self.modifier.weight_decay


class CurvedRate(Effect[LearningRateFunctionModifier]):
    """Sets the learning rate in every step to that on a curve."""

    _frequency = -1.0

    def _attach(self) -> None:
        self._check_groups()

    def _act(self, epoch: float, *, begins: bool, ends: bool) -> None:
        for group in self._groups():
            group["lr"] = self.modifier.rate(epoch, self._steps)


class ScheduledRate(Effect[LearningRateModifier]):
    """Lets the learning rate follow a schedule of torch's, counted in steps since the modifier's start.

    Attributes:
        done: global number of the step up to which the schedule has come, less those before its first.
        steps: steps of the schedule; None: it has not begun.
    """

    data = (*Effect.data, "done", "steps")
    _frequency = -1.0

    def _attach(self) -> None:
        self.done = 0
        self.steps: int | None = None
        if self.modifier.lr_class != "CosineAnnealingWarmRestarts":
            start = self.modifier.start_epoch
            self._decay = decays(self.modifier.lr_class, self.modifier.lr_kwargs, start, self._steps)

    def _act(self, epoch: float, *, begins: bool, ends: bool) -> None:
        modifier = self.modifier
        if self.steps is None:
            self._set([modifier.init_lr] * len(self._optimizer.param_groups))
        if epoch <= _EPSILON:
            self.done -= 1  # the first step of the training is not counted
            return
        if modifier.end_epoch >= 0.0 and abs(modifier.end_epoch - epoch) <= _EPSILON:
            return
        if modifier.lr_class == "CosineAnnealingWarmRestarts":
            self.steps = 0
            rate = warm_restarts(epoch - modifier.start, modifier.init_lr, modifier.lr_kwargs)
            self._set([rate] * len(self._optimizer.param_groups))
        else:
            self._go_to(epoch)

    def _go_to(self, epoch: float) -> None:
        end = self.modifier.end_epoch
        if self.steps is None:
            self.done += round(epoch * self._steps)
            self.steps = 0
            self._multiply(self._decay(0))
        now = round((epoch if end < 0.0 else min(epoch, end)) * self._steps)
        for step in range(self.steps + 1, self.steps + 1 + now - self.done):
            self._multiply(self._decay(step))
            self.steps = step
        self.done = max(self.done, now)

    def _multiply(self, factor: float) -> None:
        self._set([group["lr"] * factor for group in self._optimizer.param_groups])

    def _set(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class Trainable(Effect[TrainableParamsModifier]):
    """Makes parameters trainable or not, and at the end as they were.

    Attributes:
        original: whether each was trainable before.
    """

    data = (*Effect.data, "original")

    def _attach(self) -> None:
        self._chosen = self._parameters(as_list(self.modifier.params), strict=self.modifier.params_strict)
        self.original: list[bool] = []
        if self._begins(0.0):
            self._act(0.0, begins=True, ends=False)

    def _act(self, epoch: float, *, begins: bool, ends: bool) -> None:
        if begins and not self.original:
            self.original = [parameter.requires_grad for _, parameter in self._chosen]
            self._set([self.modifier.trainable] * len(self._chosen))
        elif ends:
            self._set(self.original)

    def _set(self, flags: Sequence[bool]) -> None:
        for (_, parameter), flag in zip(self._chosen, flags, strict=True):
            parameter.requires_grad_(flag)
            if not flag:
                parameter.grad = None  # else the optimizer would still move it


class SetParameter(Effect[SetParamModifier]):
    """Sets parameters to a value once."""

    def _attach(self) -> None:
        modifier = self.modifier
        self._chosen = self._parameters(as_list(modifier.params), strict=modifier.params_strict)
        try:
            self._value = torch.tensor(modifier.val)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"val of SetParamModifier of {self._recipe} is no number or list of numbers. Correct it."
            ) from error
        for name, parameter in self._chosen:
            if parameter.shape != self._value.shape:
                what = f"the shape of val of SetParamModifier of {self._recipe}"
                should_be = f"{list(parameter.shape)} as that of {name}"
                raise RecipeError(expected(what, should_be, list(self._value.shape), "Correct val."))

    @torch.no_grad()
    def _act(self, epoch: float, *, begins: bool, ends: bool) -> None:
        for _, parameter in self._chosen if begins else ():
            parameter.copy_(self._value)


class Masks(Effect[_ModifierT]):
    """Keeps weights at 0: in every step, and their gradients too, from its start on.

    Attributes:
        active: whether it does so now.
        masks: of the parameters' shapes, 0 where a weight stays 0, else 1.
    """

    data = (*Effect.data, "active")

    def _attach(self) -> None:
        self._chosen = self._choose()
        self.active, self._hooks = False, list[Any]()
        self.masks = [torch.ones_like(parameter, requires_grad=False) for _, parameter in self._chosen]

    def _choose(self) -> list[Named]:
        return self._parameters(as_list(self.modifier.arguments["params"]))

    def _activate(self, *, active: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        chosen = self._chosen if active else ()
        self.active, self._hooks = active, [self._hook(index, p) for index, (_, p) in enumerate(chosen)]

    def _hook(self, index: int, parameter: Any) -> Any:
        """Mask a parameter's gradients from now on, also where it is not trained before later."""
        trained = parameter.requires_grad
        hook = parameter.requires_grad_().register_hook(lambda grad: grad * self.masks[index])
        parameter.requires_grad_(trained)
        return hook

    @torch.no_grad()
    def mask(self) -> None:
        """See `Effect`."""
        for (_, parameter), mask in zip(self._chosen, self.masks if self.active else (), strict=self.active):
            parameter.mul_(mask)

    @torch.no_grad()
    def _keep(self, index: int, mask: Tensor) -> None:
        """Set a mask, in the type and memory layout of its parameter."""
        self.masks[index].copy_(mask)

    def cut(self, cuts: Mapping[str, Cut]) -> None:
        """See `Effect`."""
        for index, (name, _) in enumerate(self._chosen):
            if name in cuts:
                self.masks[index] = cuts[name].of(self.masks[index])

    def state(self) -> dict[str, Any]:
        """See `Effect`."""
        return {**super().state(), "masks": [mask.bool() for mask in self.masks]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Effect`."""
        super().restore(state)
        for index, (mask, _) in enumerate(zip(state["masks"], self.masks, strict=True)):
            self._keep(index, mask)
        self._activate(active=self.active)

    def finish(self) -> None:
        """See `Effect`."""
        self.mask()
        self._activate(active=False)


class HeldMasks(Masks[ConstantPruningModifier]):
    """Keeps the zeros that are there at its start, until its end."""

    def _act(self, epoch: float, *, begins: bool, ends: bool) -> None:
        for index, (_, parameter) in enumerate(self._chosen if begins else ()):
            self._keep(index, parameter != 0)
        if begins or ends:
            self._activate(active=begins)


class GradualMasks(Masks[MagnitudePruningModifier]):
    """Makes more and more zeros by magnitude, and keeps them."""

    @property
    def _frequency(self) -> float:
        return self.modifier.update_frequency

    def _choose(self) -> list[Named]:
        shares: dict[str, float] = {}
        chosen: dict[str, nn.Parameter] = {}
        for share, targets in self.modifier.targets:
            for name, parameter in self._parameters(targets):
                shares.setdefault(name, share)
                chosen.setdefault(name, parameter)
        initial = self.modifier.init_sparsity
        self._final = list(shares.values())
        self._initial = [
            sparsity_of(p.detach()) if initial == FROM_PARAM else float(initial) for p in chosen.values()
        ]
        return list(chosen.items())

    def _act(self, epoch: float, *, begins: bool, ends: bool) -> None:
        if begins:
            self._activate(active=True)
        self.prune(epoch)
        if ends and not self.modifier.leave_enabled:
            self._activate(active=False)

    def prune(self, epoch: float) -> None:
        """Prune to what is due at an epoch, which may be infinite."""
        pairs = zip(self._initial, self._final, strict=True)
        shares = [self.modifier.sparsity_at(epoch, initial, final) for initial, final in pairs]
        parameters = [parameter for _, parameter in self._chosen]
        try:
            kept = magnitude_masks(
                parameters, shares, self.modifier.mask_type, together=self.modifier.together
            )
        except ValueError as error:
            raise RecipeError(
                f"{self.modifier.kind} of {self._recipe} cannot prune: {error}. "
                "Correct its params or mask_type."
            ) from error
        for index, mask in enumerate(kept):
            self._keep(index, mask)
        self.mask()

    def state(self) -> dict[str, Any]:
        """See `Effect`."""
        return {**super().state(), "initial": list(self._initial)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Effect`."""
        super().restore(state)
        self._initial = list(state["initial"])


class Quantization(Effect[QuantizationModifier]):
    """Switches quantizers on, and later fixes their ranges and the statistics of batch norms.

    Attributes:
        ranges_fixed: whether the observers are off.
        norms_fixed: whether batch norms are frozen.
    """

    data = (*Effect.data, "ranges_fixed", "norms_fixed")

    def _attach(self) -> None:
        self.ranges_fixed = self.norms_fixed = False

    def update(self, epoch: float) -> None:
        """See `Effect`."""
        super().update(epoch)
        modifier = self.modifier
        if not self.ranges_fixed and _reached(epoch, modifier.disable_quantization_observer_epoch):
            self._fix_ranges()
        if not self.norms_fixed and _reached(epoch, modifier.freeze_bn_stats_epoch):
            self._fix_norms()

    def _act(self, epoch: float, *, begins: bool, ends: bool) -> None:
        if begins:
            begin(self._model)

    def _fix_ranges(self) -> None:
        freeze_quantizers(self._model)
        self.ranges_fixed = True

    def _fix_norms(self) -> None:
        freeze_batch_norms(self._model)
        self.norms_fixed = True

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Effect`."""
        if state["begun"] and not self.begun:
            begin(self._model)
        if state["ranges_fixed"]:
            self._fix_ranges()
        if state["norms_fixed"]:
            self._fix_norms()
        super().restore(state)


def _reached(epoch: float, moment: float | None) -> bool:
    return moment is not None and epoch >= moment


_EFFECTS: dict[type[Modifier], type[Effect[Any]]] = {
    SetLearningRateModifier: SetRate,
    SetWeightDecayModifier: SetDecay,
    LearningRateFunctionModifier: CurvedRate,
    LearningRateModifier: ScheduledRate,
    TrainableParamsModifier: Trainable,
    SetParamModifier: SetParameter,
    ConstantPruningModifier: HeldMasks,
    MagnitudePruningModifier: GradualMasks,
    QuantizationModifier: Quantization,
}


def effects_of(
    modifiers: Sequence[Modifier],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    recipe: str,
) -> list[Effect[Any]]:
    """The effects of modifiers, one for each.

    Args:
        modifiers: in the order in which they act; those that only name a length or a teacher do nothing.
        model: in training.
        optimizer: of its parameters.
        steps_per_epoch: optimizer steps in an epoch.
        recipe: the recipe's name, for messages.

    Raises:
        RecipeError: see `Effect`.
    """
    kinds = [
        next((effect for kind, effect in _EFFECTS.items() if isinstance(modifier, kind)), Effect[Any])
        for modifier in modifiers
    ]
    return [
        effect(modifier, model, optimizer, steps_per_epoch, recipe)
        for effect, modifier in zip(kinds, modifiers, strict=True)
    ]


def prune_at_once(modifier: MagnitudePruningModifier, model: nn.Module, recipe: str) -> None:
    """Prune a model to a modifier's final sparsity, in place.

    Args:
        modifier: one that prunes gradually.
        model: the weights that it names are changed.
        recipe: the recipe's name, for messages.

    Raises:
        RecipeError: it matches no parameter, or its blocks do not divide one.
    """
    nothing = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0)
    masks = GradualMasks(modifier, model, nothing, 1, recipe)
    masks.active = True
    masks.prune(math.inf)
