"""The one door to SparseML: a recipe run by SparseML 1.8 itself (``recipe.engine=sparseml``).

SparseML is no longer maintained since June 2025. It is the reference that the native engine is held against,
and runs the kinds of modifiers that the native engine does not have.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase, QConfig

from sparse_exp.distributed import collectives
from sparse_exp.errors import MissingDependency, RecipeError, first_line
from sparse_exp.recipes.distillation import Distiller
from sparse_exp.recipes.modifiers import interpolate

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparseml 1.8 imports pkg_resources, which warns
        from sparseml.pytorch.optim import ScheduledModifierManager
        from sparseml.pytorch.sparsification.pruning import modifier_pruning_base
        from sparseml.pytorch.sparsification.quantization import quantization_scheme
        from sparseml.pytorch.utils import LambdaLogger, LoggerManager
except ImportError as error:
    raise MissingDependency(
        "recipe.engine=sparseml needs SparseML, which is not installed here. Run: "
        "pip install 'sparse-exp[neuralmagic]' (on Python 3.11)."
    ) from error

_PARTS = ("sparseml.pytorch.sparsification.pruning.", "torch.optim.lr_scheduler")
"""Modules of the attributes of modifiers that have a state of their own."""
_MASKS = "_param_masks"
_NO_DATA = object()


class _QConfig(QConfig):
    """A QConfig with settable attributes: SparseML sets its scheme on it, which torch's no longer allows."""


def _qconfig(activation: Any, weight: Any) -> _QConfig:
    observers = [args.get_observer() if args else nn.Identity for args in (activation, weight)]
    return _QConfig(activation=observers[0], weight=observers[1])  # type: ignore[no-untyped-call]


def _interpolate(now: float, start: float, end: float, first: Any, last: Any, curve: str = "linear") -> float:
    # For a step after the end SparseML's own gives the first value, or a complex number.
    return interpolate(now, start, end, float(first), float(last), curve)


quantization_scheme._get_qconfig = _qconfig
modifier_pruning_base.interpolate = _interpolate

logging.getLogger("sparseml").setLevel(logging.WARNING)
# It warns that it has no teacher. The distillation used here is `Distiller`.
logging.getLogger("sparseml.pytorch.sparsification.distillation").setLevel(logging.ERROR)


def manager_of(text: str, name: str) -> Any:
    """SparseML's manager of a recipe, for one use: its modifiers keep the state of the model.

    Args:
        text: the recipe as YAML, without expressions.
        name: the recipe's name, for messages.

    Raises:
        RecipeError: SparseML refuses it.
    """
    try:
        manager = ScheduledModifierManager.from_yaml(f"{text}\n")
    except Exception as error:  # SparseML raises plain Exceptions of many kinds
        raise RecipeError(
            f"SparseML cannot read {name}: {first_line(error).rstrip('.')}. Correct the file."
        ) from error
    for modifier in manager.iter_modifiers():
        if type(modifier).__name__ == "ConstantPruningModifier":
            # It looks for zeros when it begins, but not again before every step: the mask would be the
            # same, and that took a tenth of a training step of yolov5l. It still masks after each step.
            modifier._update_frequency = math.inf
        if isinstance(getattr(modifier, "_submodules", None), set):
            modifier._submodules = sorted(modifier._submodules)  # a set has another order in every process
    return manager


def apply_at_once(text: str, name: str, model: nn.Module) -> None:
    """Prune a model to the final sparsities, in place and without training.

    Args:
        text: the recipe as YAML, without expressions.
        name: the recipe's name, for messages.
        model: its weights are changed.

    Raises:
        RecipeError: a modifier cannot prune without training.
    """
    for modifier in manager_of(text, name).iter_modifiers():
        if "Pruning" not in type(modifier).__name__:
            continue
        try:
            modifier.apply(model, epoch=float("inf"), loggers=_silent_logger())
        except Exception as error:  # SparseML raises plain Exceptions of many kinds
            raise RecipeError(
                f"{type(modifier).__name__} of {name} cannot prune at once ({first_line(error)}). "
                "Use MagnitudePruningModifier, or train with recipe.oneshot=false."
            ) from error


class SparsemlSparsifier:
    """A `Sparsifier` run by SparseML's manager.

    Args:
        manager: see `manager_of`.
        model: in training.
        optimizer: of its parameters.
        steps_per_epoch: optimizer steps in an epoch.
        distiller: adds the distillation loss; None: no distillation.

    Attributes:
        manager: as given.

    Raises:
        RecipeError: SparseML cannot apply the recipe to the model, or several processes train together.
    """

    def __init__(
        self,
        manager: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        distiller: Distiller | None = None,
    ) -> None:
        if collectives.size() > 1:
            raise RecipeError("recipe.engine=sparseml trains in one process only. Set trainer.devices=1.")
        self.manager, self._model = manager, model
        self._optimizer, self._steps_per_epoch, self._distiller = optimizer, steps_per_epoch, distiller
        self._gradual = [m for m in manager.iter_modifiers() if _is_gradual(m)]
        self._quantized = False
        try:
            manager.initialize(model, epoch=0.0, loggers=_silent_logger())
        except Exception as error:  # SparseML raises plain Exceptions of many kinds
            raise RecipeError(
                f"SparseML cannot apply the recipe: {first_line(error)}. Correct it."
            ) from error

    def before_step(self, epoch: float) -> None:
        """See `Sparsifier`."""
        self.manager.update(self._model, self._optimizer, epoch, self._steps_per_epoch, log_updates=False)
        if not self._quantized and any(isinstance(m, FakeQuantizeBase) for m in self._model.modules()):
            self._quantized = True
            _pin_input(self._model)
            if self._distiller:  # a quantized layer's output no longer corresponds to the teacher's
                self._distiller.unwatch()

    def loss(self, loss: Tensor, images: Tensor, raw: Sequence[Tensor], epoch: float) -> Tensor:
        """See `Sparsifier`."""
        return self._distiller.add_to(loss, images, raw, epoch) if self._distiller else loss

    def step(self, epoch: float) -> None:
        """See `Sparsifier`."""
        self.manager.optimizer_pre_step(self._model, self._optimizer, epoch, self._steps_per_epoch)
        self._optimizer.step()
        self.manager.optimizer_post_step(self._model, self._optimizer, epoch, self._steps_per_epoch)
        # SparseML would prune before the next step; see `NativeSparsifier.step`.
        after = epoch + 1.0 / self._steps_per_epoch
        for modifier in self._gradual:
            if modifier.start_epoch < after and modifier.update_ready(after, self._steps_per_epoch):
                modifier.scheduled_update(self._model, self._optimizer, after, self._steps_per_epoch)

    def state(self) -> dict[str, Any]:
        """See `Sparsifier`."""
        projections = self._distiller.projections() if self._distiller else {}
        modifiers = [dict(_data_of(modifier)) for modifier in self.manager.iter_modifiers()]
        return {"modifiers": modifiers, "projections": projections}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Sparsifier`."""
        with torch.no_grad():
            for modifier, kept in zip(self.manager.iter_modifiers(), state["modifiers"], strict=True):
                _restore(modifier, kept)
        if self._distiller:
            self._distiller.restore_projections(state["projections"])

    def cut(self, cuts: Mapping[str, Any]) -> None:
        """See `Sparsifier`; a recipe that slims is refused where SparseML runs it."""
        raise NotImplementedError

    def finish(self) -> None:
        """See `Sparsifier`."""
        self.manager.finalize(self._model)
        if self._distiller:
            self._distiller.unwatch()


def _is_gradual(modifier: Any) -> bool:
    """Whether a modifier makes zeros step by step while the model trains."""
    kind = type(modifier).__name__
    prunes = "Pruning" in kind and not kind.startswith("Constant")
    return prunes and modifier.end_epoch > max(0.0, modifier.start_epoch)


def _pin_input(model: nn.Module) -> None:
    """Fix the quantizer of the input so that a pixel value v of 0..255 becomes exactly step v."""
    stem = getattr(model, "stem", "")
    wrapper = model.get_submodule(stem) if isinstance(stem, str) else None
    quantizer: Any = getattr(getattr(wrapper, "quant", None), "activation_post_process", None)
    if not isinstance(quantizer, FakeQuantizeBase):
        return
    fixed: Any = quantizer
    with torch.no_grad():
        fixed.scale.fill_(1.0 / 255.0)
        fixed.zero_point.fill_(fixed.quant_min)
        fixed.observer_enabled[0] = 0
        fixed.activation_post_process.min_val.fill_(0.0)
        fixed.activation_post_process.max_val.fill_(1.0)


def _silent_logger() -> Any:
    """A logger that logs nothing; the default one writes sparse_logs/ into the current directory."""
    disabled = LambdaLogger(lambda *_: True, enabled=False)  # with no logger SparseML would use the default
    return LoggerManager([disabled], log_frequency=None, log_python=False)


def _data_of(thing: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Whatever of a modifier is data, by dotted names of attributes.

    SparseML's own ``state_dict`` holds only the masks.
    """
    for name, value in vars(thing).items():
        if type(value).__module__.startswith(_PARTS):
            yield from _data_of(value, f"{prefix}{name}.")
        elif (data := _plain(value)) is not _NO_DATA:
            yield prefix + name, [mask.bool() for mask in data] if name == _MASKS else data


def _restore(modifier: Any, state: Mapping[str, Any]) -> None:
    """Bring a modifier, which has the same hooks, into another one's state."""
    for name in state:
        owner, attribute = _owner(modifier, name)
        if attribute == "_enabled" and hasattr(owner, "_create_hooks"):
            owner.enabled = state[name]  # adds or removes the hooks that mask gradients
    for name, value in state.items():
        owner, attribute = _owner(modifier, name)
        setattr(owner, attribute, _restored(getattr(owner, attribute), value))


def _plain(value: Any) -> Any:
    """The value in types that ``torch.load`` reads with ``weights_only``; `_NO_DATA` where it is no data."""
    if isinstance(value, Tensor):
        return _NO_DATA if isinstance(value, nn.Parameter) else value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if type(value) is dict:
        pairs = _plain(list(value.items()))
        return _NO_DATA if pairs is _NO_DATA else dict(pairs)
    if type(value) in (list, tuple):
        items = [_plain(item) for item in value]
        return _NO_DATA if any(item is _NO_DATA for item in items) else type(value)(items)
    return None if value is None else _NO_DATA


def _owner(modifier: Any, name: str) -> tuple[Any, str]:
    """The object that holds a dotted attribute, and the attribute's own name."""
    *parts, attribute = name.split(".")
    return reduce(getattr, parts, modifier), attribute


def _restored(current: Any, kept: Any) -> Any:
    """The kept value; tensors are copied into current ones, which have the right type and memory layout."""
    if isinstance(kept, Tensor) and isinstance(current, Tensor) and current.shape == kept.shape:
        return current.copy_(kept)
    if isinstance(kept, list) and isinstance(current, list) and len(current) == len(kept):
        return [_restored(*pair) for pair in zip(current, kept, strict=True)]
    return kept
