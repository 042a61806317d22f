"""The modifiers of a recipe: what each kind takes, with the names and the defaults of SparseML 1.8.

A modifier says what is to happen; `sparse_exp.recipes.effects` does it.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from torch import nn

from sparse_exp.errors import RecipeError, expected
from sparse_exp.recipes.language import Tagged
from sparse_exp.recipes.masks import MASK_TYPES, block_of, group_size
from sparse_exp.recipes.rates import at_epoch

ALL, ALL_PRUNABLE = "__ALL__", "__ALL_PRUNABLE__"
FROM_PARAM = "__FROM_PARAM__"
_EPSILON = 2.0**-52  # of float64, as SparseML has it
CURVES = ("linear", "cubic", "inverse_cubic")
_CORRECT = "Correct the recipe, or what recipe.variables sets."


class _Refused(ValueError):
    """An argument has a value that is out of range."""

    def __init__(self, argument: str, should_be: str, got: object) -> None:
        super().__init__(argument)
        self.argument, self.should_be, self.got = argument, should_be, got


@dataclass(frozen=True, kw_only=True)
class Modifier:
    """What every modifier has.

    Attributes:
        start_epoch: the epoch at which it begins; -1 stands for the beginning.
        end_epoch: the epoch at which it ends; -1: never.
    """

    start_epoch: float = -1.0
    end_epoch: float = -1.0
    _ends: ClassVar[str] = "maybe"  # "maybe": it may stay open; "after": after its start; "never"

    def __post_init__(self) -> None:
        _require("start_epoch", self.start_epoch >= 0 or self.start_epoch == -1, "0 or more, or -1", self)
        if self._ends == "never":
            object.__setattr__(self, "end_epoch", -1.0)
        elif self._ends == "after":
            _require("end_epoch", self.end_epoch > self.start, f"above {self.start:g}", self)
        else:
            ends = self.end_epoch == -1 or self.end_epoch >= self.start
            _require("end_epoch", ends, f"at least {self.start:g}, or -1", self)

    @property
    def kind(self) -> str:
        """The name of the modifier's class, as in the recipe."""
        return type(self).__name__

    @property
    def start(self) -> float:
        """First epoch in which it acts."""
        return max(0.0, self.start_epoch)

    @property
    def prunes(self) -> bool:
        """Whether it makes zeros or keeps them."""
        return "Pruning" in self.kind

    @property
    def gradual(self) -> bool:
        """Whether it makes zeros step by step while the model trains."""
        return self.prunes and not self.kind.startswith("Constant") and self.end_epoch > self.start

    @property
    def sets_rate(self) -> bool:
        """Whether it sets learning rates."""
        return "LearningRate" in self.kind

    def rate_at(self, epoch: float) -> float:
        """The learning rate that it sets at an epoch; of a stepwise schedule the initial one."""
        raise AttributeError(f"{self.kind} sets no learning rate")

    @property
    def arguments(self) -> dict[str, Any]:
        """All its arguments by name, in alphabetical order."""
        return {name: getattr(self, name) for name in sorted(f.name for f in fields(self))}

    def as_data(self) -> Tagged:
        """The modifier as plain data, from which `make` makes the same one."""
        return Tagged(self.kind, {name: _plain(value) for name, value in self.arguments.items()})


def _require(argument: str, holds: bool, should_be: str, modifier: Modifier) -> None:  # noqa: FBT001
    if not holds:
        raise _Refused(argument, should_be, getattr(modifier, argument))


@dataclass(frozen=True, kw_only=True)
class EpochRangeModifier(Modifier):
    """The length of the training."""

    start_epoch: float = field()
    end_epoch: float = field()


def _require_rate(modifier: Any, *arguments: str, above: bool = False) -> None:
    for name in arguments:
        value = getattr(modifier, name)
        holds = 0 < value <= 1 if above else 0 <= value <= 1
        _require(name, holds, "above 0 and at most 1" if above else "0 to 1", modifier)


@dataclass(frozen=True, kw_only=True)
class SetLearningRateModifier(Modifier):
    """Set the learning rate once."""

    learning_rate: float
    param_groups: list[int] | None = None
    constant_logging: bool = False
    _ends: ClassVar[str] = "never"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_rate(self, "learning_rate", above=True)

    def rate_at(self, epoch: float) -> float:
        """See `Modifier`."""
        return self.learning_rate


@dataclass(frozen=True, kw_only=True)
class LearningRateFunctionModifier(Modifier):
    """Let the learning rate follow a curve: ``linear``, ``cosine`` or ``cyclic_linear``."""

    lr_func: str
    init_lr: float
    final_lr: float
    start_epoch: float = field()
    end_epoch: float = field()
    cycle_epochs: float = 1.0
    param_groups: list[int] | None = None
    update_frequency: float = -1.0
    _ends: ClassVar[str] = "after"

    def __post_init__(self) -> None:
        super().__post_init__()
        functions = ("linear", "cosine", "cyclic_linear")
        _require("lr_func", self.lr_func in functions, f"one of {', '.join(functions)}", self)
        _require_rate(self, "init_lr", "final_lr")
        _require("cycle_epochs", self.cycle_epochs > 0, "above 0", self)

    def rate_at(self, epoch: float) -> float:
        """See `Modifier`."""
        if epoch <= self.start or epoch >= self.end_epoch:
            return self.init_lr if epoch <= self.start else self.final_lr
        return self.rate(epoch, 1000)

    def rate(self, epoch: float, steps_per_epoch: int) -> float:
        """The learning rate of a step: on the curve, also where a step lies behind its end."""
        span = self.start_epoch if self.lr_func == "cyclic_linear" else self.start, self.end_epoch
        return at_epoch(
            self.lr_func, epoch, span, (self.init_lr, self.final_lr), self.cycle_epochs, steps_per_epoch
        )


_SCHEDULES: dict[str, tuple[set[str], set[str]]] = {  # what each needs, and what it may have
    "StepLR": ({"gamma", "step_size"}, set()),
    "ExponentialLR": ({"gamma"}, {"step_size"}),
    "MultiStepLR": ({"gamma", "milestones"}, set()),
    "CosineAnnealingWarmRestarts": ({"lr_min", "cycle_epochs"}, {"T_mult"}),
}


@dataclass(frozen=True, kw_only=True)
class LearningRateModifier(Modifier):
    """Let the learning rate follow one of torch's schedules, its lengths in epochs."""

    lr_class: str
    lr_kwargs: dict[str, Any]
    init_lr: float
    start_epoch: float = field()
    update_frequency: float = -1.0
    constant_logging: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("lr_class", self.lr_class in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}", self)
        _require_rate(self, "init_lr", above=True)
        needed, optional = _SCHEDULES[self.lr_class]
        given = set(self.lr_kwargs)
        names = ", ".join(sorted(needed | optional))
        if not needed <= given <= needed | optional:
            raise _Refused("lr_kwargs", f"values for {names} alone", self.lr_kwargs)
        self._check_numbers()
        last = self.end_epoch if self.end_epoch >= 0 else math.inf
        if not all(self.start_epoch < milestone < last for milestone in self.milestones):
            raise _Refused(
                "lr_kwargs", f"milestones between {self.start_epoch:g} and {last:g}", self.lr_kwargs
            )

    def _check_numbers(self) -> None:
        numbers = {
            name: [_float("lr_kwargs", each, "float") for each in as_list(value)]
            for name, value in self.lr_kwargs.items()
            if not (self.lr_class == "ExponentialLR" and name == "step_size")  # it is 1
        }
        low = {"step_size": 0.0, "cycle_epochs": 0.0, "T_mult": 1.0 - _EPSILON}
        if any(min(values) <= low.get(name, -_EPSILON) for name, values in numbers.items()):
            raise _Refused("lr_kwargs", "numbers of 0 or more, and lengths above 0", self.lr_kwargs)
        plain = {name: v if name == "milestones" else v[0] for name, v in numbers.items()}
        object.__setattr__(self, "lr_kwargs", plain)

    @property
    def milestones(self) -> list[float]:
        """Epochs at which the rate falls, of ``MultiStepLR``."""
        return list(self.lr_kwargs.get("milestones", []))

    def rate_at(self, epoch: float) -> float:
        """See `Modifier`."""
        return self.init_lr


@dataclass(frozen=True, kw_only=True)
class SetWeightDecayModifier(Modifier):
    """Set the weight decay once."""

    weight_decay: float
    param_groups: list[int] | None = None
    constant_logging: bool = False
    _ends: ClassVar[str] = "never"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("weight_decay", self.weight_decay >= 0, "0 or more", self)


@dataclass(frozen=True, kw_only=True)
class TrainableParamsModifier(Modifier):
    """Train parameters, or keep them as they are, until the end; then as before."""

    params: str | list[str]
    trainable: bool
    params_strict: bool = True


@dataclass(frozen=True, kw_only=True)
class SetParamModifier(Modifier):
    """Set parameters to a value once."""

    params: str | list[str]
    val: Any
    params_strict: bool = True
    start_epoch: float = 0.0
    _ends: ClassVar[str] = "never"


@dataclass(frozen=True, kw_only=True)
class ConstantPruningModifier(Modifier):
    """Keep every zero that is there when it begins."""

    params: str | list[str]
    update_frequency: float = -1.0


@dataclass(frozen=True, kw_only=True)
class MagnitudePruningModifier(Modifier):
    """Prune the weights with the smallest magnitude, more and more, in each parameter for itself.

    Attributes:
        init_sparsity: share of zeros at the start, 0..1, or ``__FROM_PARAM__``: the share that is there.
        final_sparsity: share of zeros at the end, above 0 and below 1; or a mapping from shares to
            parameters, with ``params: []``.
        update_frequency: epochs between two updates; -1: one in every step.
        params: names, patterns, ``__ALL__`` or ``__ALL_PRUNABLE__``, which an empty list means, too.
        leave_enabled: whether the zeros are kept after the end.
        inter_func: curve between the two shares.
        mask_type: see `sparse_exp.recipes.masks.MaskType`.
    """

    init_sparsity: float | str
    final_sparsity: float | dict[float, Any]
    start_epoch: float = field()
    end_epoch: float = field()
    update_frequency: float
    params: str | list[str]
    leave_enabled: bool = True
    inter_func: str = "cubic"
    mask_type: str | list[int] = "unstructured"
    _ends: ClassVar[str] = "after"
    _together: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        frequency = self.update_frequency == -1 or self.update_frequency > 0
        _require("update_frequency", frequency, "above 0, or -1", self)
        _require("inter_func", self.inter_func in CURVES, f"one of {', '.join(CURVES)}", self)
        initial = self.init_sparsity
        from_param = initial == FROM_PARAM
        is_share = isinstance(initial, int | float) and 0 <= initial <= 1
        _require("init_sparsity", from_param or is_share, f"0 to 1, or {FROM_PARAM}", self)
        shares = self.shares
        between = all(isinstance(share, float) and 0 < share < 1 for share in shares)
        _require("final_sparsity", bool(shares) and between, "above 0 and below 1", self)
        if isinstance(self.final_sparsity, dict):
            _require("params", not self.params, "[] where final_sparsity names the parameters", self)
        self._check_mask_type()
        if self.together and (from_param or len(shares) > 1 or self.mask_type == "filter"):
            raise _Refused(
                f"{self.kind}, which ranks all weights together,",
                "given one init_sparsity, one final_sparsity and no filters",
                [initial, self.final_sparsity, self.mask_type],
            )

    def _check_mask_type(self) -> None:
        kind = self.mask_type
        if isinstance(kind, list) and len(kind) > 2 and all(side == 1 for side in kind[2:]):
            object.__setattr__(self, "mask_type", kind[:2])
            kind = kind[:2]
        if isinstance(kind, list):
            holds = len(kind) == 2 and all(type(side) is int and (side > 0 or side == -1) for side in kind)
        else:
            holds = kind in MASK_TYPES
        _require("mask_type", holds, f"one of {', '.join(MASK_TYPES)}, or a list such as [1, 4]", self)

    @property
    def together(self) -> bool:
        """Whether all parameters are ranked as one."""
        return self._together

    @property
    def shares(self) -> list[Any]:
        """The final shares, one for each group of parameters."""
        return list(self.final_sparsity) if isinstance(self.final_sparsity, dict) else [self.final_sparsity]

    @property
    def targets(self) -> list[tuple[float, list[str]]]:
        """Final share and targets, see `sparse_exp.recipes.layer_patterns`, of each group of parameters."""
        final = self.final_sparsity
        groups = final if isinstance(final, dict) else {final: self.params or ALL_PRUNABLE}
        return [(float(share), as_list(targets)) for share, targets in groups.items()]

    def sparsity_at(self, epoch: float, initial: float, final: float) -> float:
        """The share of zeros that is due at an epoch, 0..1; before the start and after the end as there."""
        return interpolate(epoch, self.start_epoch, self.end_epoch, initial, final, self.inter_func)

    def promised(
        self, shape: Iterable[int], final: float, epoch: float, before: float, *, kept: bool
    ) -> float:
        """The least share of zeros that it has given a layer by an epoch, 0..1.

        Args:
            shape: (O, I, ...) of the layer's weight.
            final: the layer's final share.
            epoch: a moment between two steps.
            before: the layer's share of zeros at epoch 0, 0..1.
            kept: whether zeros stay after the end.
        """
        if epoch <= self.start or (epoch >= self.end_epoch and not kept):
            return 0.0
        initial = before if self.init_sparsity == FROM_PARAM else float(self.init_sparsity)
        # There is an update in every update_frequency epochs (-1: in every step), and one at the end.
        last = max(self.start, epoch - max(0.0, self.update_frequency))
        share = self.sparsity_at(epoch if epoch >= self.end_epoch else last, initial, final)
        shape = list(shape)
        weights, group = math.prod(shape), group_size(self.mask_type, shape)
        return float(round(weights / group * share) * group / weights)


@dataclass(frozen=True, kw_only=True)
class GlobalMagnitudePruningModifier(MagnitudePruningModifier):
    """Prune the weights with the smallest magnitude, more and more, all parameters ranked as one."""

    _together: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class GMPruningModifier(MagnitudePruningModifier):
    """`MagnitudePruningModifier` as it was called first; ``global_sparsity`` ranks all parameters as one."""

    global_sparsity: bool = False
    phased: bool = False
    score_type: str = "magnitude"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("phased", not self.phased, "False", self)
        _require("score_type", self.score_type == "magnitude", "magnitude", self)

    @property
    def together(self) -> bool:
        """See `MagnitudePruningModifier`."""
        return self.global_sparsity

    @property
    def arguments(self) -> dict[str, Any]:
        """See `Modifier`; without what may have one value only."""
        return {k: v for k, v in super().arguments.items() if k not in ("phased", "score_type")}


@dataclass(frozen=True, kw_only=True)
class QuantizationModifier(Modifier):
    """Quantization-aware training of the layers that it names, in the newer or the older dialect.

    Attributes:
        disable_quantization_observer_epoch: when the ranges are fixed; None: never.
        freeze_bn_stats_epoch: when the statistics of batch norms are fixed; None: never.
        options: its other arguments, see `sparse_exp.quantization.scheme.layer_schemes`.
    """

    disable_quantization_observer_epoch: float | None = None
    freeze_bn_stats_epoch: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    _ends: ClassVar[str] = "never"

    def __post_init__(self) -> None:
        _require("end_epoch", self.end_epoch == -1, "-1", self)
        super().__post_init__()
        for name in ("disable_quantization_observer_epoch", "freeze_bn_stats_epoch"):
            moment = getattr(self, name)
            holds = moment is None or moment >= self.start_epoch
            _require(name, holds, f"at least {self.start_epoch:g}", self)

    @property
    def arguments(self) -> dict[str, Any]:
        """See `Modifier`."""
        own = {name: value for name, value in super().arguments.items() if name != "options"}
        return dict(sorted({**own, **self.options}.items()))


@dataclass(frozen=True, kw_only=True)
class SlimmingModifier(Modifier):
    """Take channels out for good, at once or in several steps. SparseML has no such modifier.

    Attributes:
        start_epoch: of the first step.
        end_epoch: of the last step; that of the first where there is only one.
        share: of the start's multiplications that stay, above 0 and at most 1.
        steps: in each the same part of the multiplications goes.
        multiple: of the widths.
        importance: what says how much a channel is worth: ``gradients`` of the loss of labelled images, or
            ``weights`` alone.
    """

    start_epoch: float = field()
    end_epoch: float = field()
    share: float
    steps: float = 1.0
    multiple: float = 8.0
    importance: str = "gradients"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("start_epoch", self.start_epoch >= 0, "0 or more", self)
        _require("share", 0 < self.share <= 1, "above 0 and at most 1", self)
        for name in ("steps", "multiple"):
            value = getattr(self, name)
            _require(name, value >= 1 and value == round(value), "a whole number, 1 or more", self)
        ends = self.end_epoch > self.start if self.steps > 1 else self.end_epoch == self.start
        _require("end_epoch", ends, f"{'after' if self.steps > 1 else 'at'} {self.start:g}", self)
        kinds = ("gradients", "weights")
        _require("importance", self.importance in kinds, f"one of {', '.join(kinds)}", self)

    @property
    def moments(self) -> list[tuple[float, float]]:
        """Epoch of each step, and the share of the multiplications that stays from then on."""
        count = round(self.steps)
        length = (self.end_epoch - self.start) / max(1, count - 1)
        return [(self.start + i * length, 1 - (1 - self.share) * (i + 1) / count) for i in range(count)]


@dataclass(frozen=True, kw_only=True)
class DistillationModifier(Modifier):
    """Learn what a teacher predicts."""

    distill_output_keys: list[Any] | None = None
    teacher_input_keys: list[Any] | None = None
    update_frequency: float = -1.0
    hardness: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("hardness", 0 <= self.hardness <= 1, "0 to 1", self)
        _require("temperature", self.temperature > 0, "above 0", self)


@dataclass(frozen=True, kw_only=True)
class PerLayerDistillationModifier(Modifier):
    """Learn the feature maps of a teacher's layers."""

    gain: float = 1.5
    update_frequency: float = -1.0
    normalize: bool = True
    student_layer_names: list[str] | None = None
    teacher_layer_names: list[str] | None = None
    project_features: bool = True
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        own, other = self.student_layer_names, self.teacher_layer_names
        if own is None or other is None:  # one list stands for both
            for name in ("student_layer_names", "teacher_layer_names"):
                object.__setattr__(self, name, own or other)
        elif len(own) != len(other):
            raise _Refused("teacher_layer_names", f"{len(own)} names, one for each of the student's", other)


@dataclass(frozen=True, kw_only=True)
class OtherModifier(Modifier):
    """A modifier of a kind that only SparseML runs.

    Attributes:
        name: its kind.
        values: its arguments.
    """

    name: str
    values: dict[str, Any]

    @property
    def kind(self) -> str:
        """See `Modifier`."""
        return self.name

    @property
    def arguments(self) -> dict[str, Any]:
        """See `Modifier`."""
        return dict(self.values)


KINDS: dict[str, type[Modifier]] = {
    cls.__name__: cls
    for cls in (
        EpochRangeModifier,
        SetLearningRateModifier,
        LearningRateFunctionModifier,
        LearningRateModifier,
        SetWeightDecayModifier,
        TrainableParamsModifier,
        SetParamModifier,
        ConstantPruningModifier,
        GMPruningModifier,
        MagnitudePruningModifier,
        GlobalMagnitudePruningModifier,
        QuantizationModifier,
        SlimmingModifier,
        DistillationModifier,
        PerLayerDistillationModifier,
    )
}
SPARSEML_ONLY = (
    "ACDCPruningModifier",
    "GradualParamModifier",
    "LayerPruningModifier",
    "LayerThinningModifier",
    "MFACPruningModifier",
    "MovementPruningModifier",
    "OBSPruningModifier",
    "PowerpropagationModifier",
    "RigLPruningModifier",
    "SparsificationLoggingModifier",
    "StructuredPruningModifier",
    "TopKASTPruningModifier",
)
"""Kinds that SparseML 1.8 has beyond `KINDS`."""


def make(data: Tagged, recipe: str, *, others: bool = False) -> Modifier:
    """Make a modifier.

    Args:
        data: its kind and arguments.
        recipe: the recipe's name, for messages.
        others: take the kinds in `SPARSEML_ONLY` as `OtherModifier`.

    Raises:
        RecipeError: the kind or an argument is unknown, a needed argument is missing, or a value is out of
            range.
    """
    if data.kind in SPARSEML_ONLY and others:
        return _made(OtherModifier, _other(data), data.kind, recipe)
    if data.kind not in KINDS:
        raise RecipeError(_unknown(data.kind, recipe))
    cls = KINDS[data.kind]
    given = {name: value for name, value in data.items() if name != "log_types"}  # of SparseML before 1.0
    return _made(cls, _quantization(given) if cls is QuantizationModifier else given, data.kind, recipe)


def _made(cls: type[Modifier], given: Mapping[str, Any], kind: str, recipe: str) -> Modifier:
    owner, known = f"{kind} of {recipe}", {f.name: f for f in fields(cls)}
    for name in given:
        if name not in known:
            raise RecipeError(f"{owner} has no argument {name!r}. Its arguments: {', '.join(sorted(known))}.")
    for name, each in known.items():
        if name not in given and each.default is MISSING and each.default_factory is MISSING:
            raise RecipeError(f"{owner} needs the argument {name!r}. Set it in the recipe.")
    try:
        return cls(**{name: _converted(name, value, str(known[name].type)) for name, value in given.items()})
    except _Refused as error:
        what = error.argument if " " in error.argument else f"{error.argument} of {owner}"
        raise RecipeError(expected(what, error.should_be, error.got, _CORRECT)) from error


def _other(data: Tagged) -> dict[str, Any]:
    moments = {name: data[name] for name in ("start_epoch", "end_epoch") if name in data}
    return {"name": data.kind, "values": dict(data), **moments}


def _quantization(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a QuantizationModifier, those of either dialect gathered."""
    own = {f.name for f in fields(QuantizationModifier)} - {"options"}
    options = {name: value for name, value in given.items() if name not in own}
    return {**{name: value for name, value in given.items() if name in own}, "options": options}


def _unknown(kind: str, recipe: str) -> str:
    """The message for a kind that is not run here."""
    known = ", ".join(KINDS)
    if kind in SPARSEML_ONLY:
        return (
            f"{recipe} has a modifier {kind!r}, which only SparseML runs. Set recipe.engine=sparseml, or use "
            f"one of {known}."
        )
    near = ", ".join(difflib.get_close_matches(kind, [*KINDS, *SPARSEML_ONLY], n=3, cutoff=0.3))
    nearest = f"; the nearest names are {near}" if near else ""
    return f"{recipe} has a modifier {kind!r}, which is not known. Correct it{nearest}. Known are {known}."


def _converted(name: str, value: Any, annotation: str) -> Any:
    """A value in the type of its argument.

    Args:
        name: of the argument.
        value: as YAML has it.
        annotation: the type of the argument, as in its class.
    """
    if value is None and "None" in annotation:
        return None
    if annotation.startswith("float"):
        return _float(name, value, annotation)
    if annotation == "str" and not isinstance(value, str):
        raise _Refused(name, "a text", value)
    if annotation == "bool":
        return _bool(name, value)
    if annotation.startswith("str | list[str]"):
        return _targets(name, value)
    if annotation.startswith("list"):
        items = value if isinstance(value, list) else [value]
        if "int" in annotation and not all(type(item) is int and item >= 0 for item in items):
            raise _Refused(name, "a list of numbers of groups, 0 or more", value)
        return items
    if annotation.startswith("dict") and not isinstance(value, dict):
        raise _Refused(name, "a mapping", value)
    return value


def _float(name: str, value: Any, annotation: str) -> Any:
    """A finite number; YAML reads ``1e-3`` as a text."""
    if "dict" in annotation and isinstance(value, dict):
        return {_float(name, share, "float"): targets for share, targets in value.items()}
    if value == FROM_PARAM and "str" in annotation:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise _Refused(name, "a number", value) from error
    if isinstance(value, bool) or not math.isfinite(number):
        raise _Refused(name, "a number", value)
    return number


def _bool(name: str, value: Any) -> bool:
    words = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
    found = value if isinstance(value, bool) else words.get(str(value).lower())
    if found is None:
        raise _Refused(name, "True or False", value)
    return found


def _targets(name: str, value: Any) -> str | list[str]:
    """Names and patterns of parameters; a text alone must be one of the two words."""
    if isinstance(value, str):
        if value.upper() not in (ALL, ALL_PRUNABLE):
            raise _Refused(name, f"a list of names, {ALL} or {ALL_PRUNABLE}", value)
        return value.upper()
    flat = [item for part in as_list(value) for item in as_list(part)]
    if not all(isinstance(item, str) for item in flat):
        raise _Refused(name, f"a list of names, {ALL} or {ALL_PRUNABLE}", value)
    return flat


def as_list(value: Any) -> list[Any]:
    """A list as it is; anything else as the only item of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def in_order(modifiers: Iterable[Modifier]) -> list[Modifier]:
    """The order in which modifiers act within a step, as in SparseML: what ends later acts later."""
    return sorted(modifiers, key=lambda m: _place(m.end_epoch, m.start_epoch, _identifier(m)))


def stages_in_order(stages: Mapping[str, list[Modifier]]) -> dict[str, list[Modifier]]:
    """The order in which stages act within a step, as in SparseML: by their last end and first start."""

    def place(listed: list[Modifier]) -> tuple[float, float, str]:
        end, start = max(m.end_epoch for m in listed), min(m.start_epoch for m in listed)
        return _place(end, start, max(map(_identifier, listed)))

    return dict(sorted(stages.items(), key=lambda item: place(item[1])))


def _place(end: float, start: float, identifier: str) -> tuple[float, float, str]:
    return math.inf if end == -1 else end, start, identifier


def _identifier(modifier: Modifier) -> str:
    """SparseML's name of a modifier, by which it orders those with the same times."""
    texts = sorted(
        f"{name}:{'null' if value is None else value}" for name, value in modifier.arguments.items()
    )
    return f"{modifier.kind}-{hashlib.md5(str(texts).encode(), usedforsecurity=False).hexdigest()}"


def interpolate(now: float, start: float, end: float, first: float, last: float, curve: str) -> float:
    """A value on a curve between two moments; outside of them that of the nearer one.

    Args:
        now: a moment.
        start: the moment of ``first``.
        end: the moment of ``last``, after ``start``.
        first: the value at the start.
        last: the value at the end.
        curve: one of `CURVES`.
    """
    x = (min(max(now, start), end) - start) / (end - start)
    y = {"linear": x, "cubic": 1 - (1 - x) ** 3, "inverse_cubic": 1 - (1 - x) ** (1 / 3)}[curve]
    return first if y <= _EPSILON else last if y >= 1.0 - _EPSILON else y * (last - first) + first


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def check_blocks(modifier: Modifier, layers: Iterable[str], model: nn.Module, recipe: str) -> None:
    """Refuse blocks, given as a list, that do not divide a layer's output and input channels.

    Args:
        modifier: one that prunes.
        layers: names of the layers that it prunes.
        model: before quantization.
        recipe: the recipe's name, for the message.

    Raises:
        RecipeError: names the first layer that they do not divide.
    """
    block = modifier.arguments.get("mask_type")
    if not isinstance(block, list):
        return
    for name in layers:
        shape: Any = model.get_parameter(f"{name}.weight").shape
        try:
            block_of(block, shape)
        except ValueError as error:
            raise RecipeError(
                f"{modifier.kind} of {recipe} prunes blocks of {block}, which do not divide {name} with its "
                f"{list(shape[:2])} channels. Leave that layer out of params, or set mask_type: block4."
            ) from error
