"""The one door to SparseML: reading a recipe, knowing its phases, applying it to a model.

SparseML ended in June 2025. What the rest of the project needs of it is the small interface of
`Recipe` and `Sparsifier`, so that it can be replaced here.
"""

from __future__ import annotations

import difflib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import nn

from sparse_exp.errors import RecipeError, expected

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # sparseml 1.8 imports pkg_resources, which warns
    from sparseml.pytorch.optim import ScheduledModifierManager
    from sparseml.pytorch.sparsification.quantization import quantization_scheme
    from sparseml.pytorch.utils import LambdaLogger, LoggerManager


class _QConfig(torch.ao.quantization.QConfig):
    """A QConfig that takes attributes: SparseML hangs its scheme on it, which torch's no longer allows."""


def _qconfig(activation: Any, weight: Any) -> _QConfig:
    observers = [args.get_observer() if args else nn.Identity for args in (activation, weight)]
    return _QConfig(activation=observers[0], weight=observers[1])  # type: ignore[no-untyped-call]


quantization_scheme._get_qconfig = _qconfig

logging.getLogger("sparseml").setLevel(logging.WARNING)
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


class Sparsifier(Protocol):
    """A recipe applied to a model while it trains."""

    def before_step(self, epoch: float) -> None:
        """Bring model and optimizer to where the recipe wants them before the forward pass."""

    def step(self, epoch: float) -> None:
        """Take one optimizer step and restore what the recipe keeps, such as masks."""

    def finish(self) -> None:
        """Detach from the model, which keeps its structure."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which the same things hold.

    Attributes:
        name: ``dense``, ``pruned`` or ``pruned_quant``; also names the phase's best checkpoint.
        start: first epoch (may be fractional).
        end: epoch at which it ends.
        quantized: whether QAT runs; EMA and autocast are off then.
    """

    name: str
    start: float
    end: float
    quantized: bool


class Recipe:
    """A SparseML recipe with its variables filled in.

    Args:
        text: the recipe, YAML or Markdown with YAML front matter.
        variables: values for root variables of the recipe.
        name: what to call it in messages.

    Raises:
        RecipeError: the text is no recipe, or a variable is not one of its root variables.
    """

    def __init__(self, text: str, variables: Mapping[str, float] | None = None, name: str = "recipe") -> None:
        self.name = name
        body = _yaml_of(text)
        _check_variables(body, variables or {}, name)
        try:
            self._manager = ScheduledModifierManager.from_yaml(body, recipe_variables=dict(variables or {}))
        except Exception as error:  # SparseML raises plain Exceptions of many kinds
            reason = _first_line(error).rstrip(".")
            do = "Correct the file, or what recipe.variables sets (are the phases shorter than num_epochs?)."
            raise RecipeError(f"SparseML cannot read {name}: {reason}. {do}") from error

    @classmethod
    def from_file(cls, path: Path, variables: Mapping[str, float] | None = None) -> Recipe:
        """Read a recipe file (``.md`` with front matter, or ``.yaml``)."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"Cannot read the recipe {path}: {error}. Check recipe.file.") from error
        return cls(text, variables, name=path.name)

    @property
    def text(self) -> str:
        """The recipe as it runs, as YAML that SparseML reads back."""
        return str(self._manager)

    @property
    def epochs(self) -> float:
        """Length of the training in epochs."""
        # SparseML's own max_epochs is rounded up to whole epochs.
        return max(float(max(m.start_epoch, m.end_epoch)) for m in self._manager.iter_modifiers())

    @property
    def quantization_start(self) -> float | None:
        """Epoch at which QAT begins; None for a recipe without quantization."""
        starts = [max(0.0, m.start_epoch) for m in self._modifiers("QuantizationModifier")]
        return min(starts) if starts else None

    @property
    def prunes(self) -> bool:
        """Whether the recipe holds or makes zeros."""
        return any("Pruning" in type(modifier).__name__ for modifier in self._manager.iter_modifiers())

    @property
    def holds_mask(self) -> bool:
        """Whether the recipe only keeps zeros that are there from the start."""
        return bool(self._modifiers("ConstantPruningModifier"))

    @property
    def sets_learning_rate(self) -> bool:
        """Whether the recipe's modifiers replace the trainer's own learning-rate schedule."""
        return any("LearningRate" in type(modifier).__name__ for modifier in self._manager.iter_modifiers())

    def phases(self) -> list[Phase]:
        """The phases of the training, in order."""
        first = "pruned" if self.prunes else "dense"
        start = self.quantization_start
        if start is None:
            return [Phase(first, 0.0, self.epochs, quantized=False)]
        quantized = Phase(f"{first}_quant", start, self.epochs, quantized=True)
        return [Phase(first, 0.0, start, quantized=False), quantized] if start > 0 else [quantized]

    def learning_rates(self, phase: Phase) -> list[tuple[float, float]]:
        """(first, last) learning rate of each modifier that acts within the phase."""
        rates = []
        for modifier in self._manager.iter_modifiers():
            starts = max(0.0, modifier.start_epoch)
            if phase.start <= starts < phase.end and hasattr(modifier, "init_lr"):
                rates.append((starts, float(modifier.init_lr), float(getattr(modifier, "final_lr", 0.0))))
            elif phase.start <= starts < phase.end and hasattr(modifier, "learning_rate"):
                rates.append((starts, float(modifier.learning_rate), float(modifier.learning_rate)))
        return [(first, last) for _, first, last in sorted(rates)]

    def check(self, model: nn.Module) -> None:
        """Refuse a recipe that cannot do to this model what it says.

        Raises:
            RecipeError: the schedule is empty, quantization starts after the end, or a modifier
                names no layer of the model (the nearest names are given).
        """
        if self.epochs <= 0:
            raise RecipeError(
                expected(f"the length of {self.name}", "more than 0 epochs", self.epochs, "Set num_epochs.")
            )
        start = self.quantization_start
        if start is not None and start >= self.epochs:
            do = "Make quantization_epochs smaller than num_epochs, and both more than 0."
            raise RecipeError(expected("the start of quantization", f"below {self.epochs:g}", start, do))
        for modifier in self._manager.iter_modifiers():
            _check_targets(modifier, model, self.name)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Sparsifier:
        """Begin to apply the recipe to a model in training."""
        self._manager.initialize(model, epoch=0.0, loggers=_silent())
        return _ManagedSparsifier(self._manager, model, optimizer, steps_per_epoch)

    def apply_structure(self, model: nn.Module) -> nn.Module:
        """Bring a float model into the structure it has after the whole recipe (QAT modules and all)."""
        was_training = model.training
        model.train()  # in evaluation mode torch would fold batch norms away instead of keeping them
        self._manager.apply_structure(model, epoch=float("inf"), loggers=_silent())
        return model.train(was_training)

    def _modifiers(self, name: str) -> list[Any]:
        return [m for m in self._manager.iter_modifiers() if type(m).__name__.endswith(name)]


class _ManagedSparsifier:
    def __init__(
        self, manager: Any, model: nn.Module, optimizer: torch.optim.Optimizer, steps_per_epoch: int
    ) -> None:
        self._manager, self._model = manager, model
        self._optimizer, self._steps_per_epoch = optimizer, steps_per_epoch

    def before_step(self, epoch: float) -> None:
        self._manager.update(self._model, self._optimizer, epoch, self._steps_per_epoch, log_updates=False)

    def step(self, epoch: float) -> None:
        self._manager.optimizer_pre_step(self._model, self._optimizer, epoch, self._steps_per_epoch)
        self._optimizer.step()
        self._manager.optimizer_post_step(self._model, self._optimizer, epoch, self._steps_per_epoch)

    def finish(self) -> None:
        self._manager.finalize(self._model)


def _silent() -> LoggerManager:
    """A logger that keeps quiet: the default one writes sparse_logs/ into the current directory."""
    nobody = LambdaLogger(lambda *_: True, enabled=False)  # an empty manager would count as none given
    return LoggerManager([nobody], log_frequency=None, log_python=False)


def freeze_quantizers(model: nn.Module) -> nn.Module:
    """Stop observers from moving the quantization ranges, as in a deployed model."""
    return model.apply(torch.ao.quantization.disable_observer)


def is_quantized(state_names: Sequence[str]) -> bool:
    """Whether a state dict with these names is that of a QAT model."""
    return any("fake_quant" in name or "activation_post_process" in name for name in state_names)


def _yaml_of(text: str) -> str:
    match = _FRONT_MATTER.match(text.lstrip("\ufeff\n"))
    return match.group(1) if match else text


def _check_variables(body: str, variables: Mapping[str, float], name: str) -> None:
    # SparseML's own tags (!EpochRangeModifier) are of no interest here; a loader that reads any tag
    # as plain data finds the root variables.
    try:
        roots = yaml.load(body, Loader=_AnyTagLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not valid YAML: {_first_line(error)}. Correct the file.") from error
    if not isinstance(roots, dict) or "modifiers:" not in body:
        raise RecipeError(f"{name} holds no recipe: a mapping with lists of modifiers is expected.")
    known = [key for key, value in roots.items() if not isinstance(value, list | dict)]
    for variable in variables:
        if variable not in known:
            raise RecipeError(
                f"The recipe {name} has no variable {variable!r}. Its variables: {', '.join(known)}."
            )


class _AnyTagLoader(yaml.SafeLoader):
    pass


def _plain(loader: yaml.SafeLoader, _suffix: str, node: yaml.Node) -> Any:
    return loader.construct_mapping(node) if isinstance(node, yaml.MappingNode) else str(node.value)


_AnyTagLoader.add_multi_constructor("!", _plain)


def _check_targets(modifier: Any, model: nn.Module, recipe: str) -> None:
    kind = type(modifier).__name__
    for target in _targets(modifier):
        if not _matches(target, model):
            names = [name for name, _ in model.named_parameters()]
            names += sorted({type(module).__name__ for module in model.modules()})
            near = difflib.get_close_matches(target.removeprefix("re:"), names, n=3, cutoff=0.3) or names[:3]
            raise RecipeError(
                f"{kind} of {recipe} names {target!r}, which matches no layer of the model. "
                f"Correct it; the nearest names are {', '.join(near)}."
            )


def _targets(modifier: Any) -> Iterator[str]:
    for attribute in ("params", "ignore", "scheme_overrides", "submodules"):
        targets = getattr(modifier, attribute, None) or []
        yield from [targets] if isinstance(targets, str) else targets


def _matches(target: str, model: nn.Module) -> bool:
    if target.startswith("__ALL"):
        return True
    modules = dict(model.named_modules())
    if target.startswith("re:"):
        return any(re.match(target[3:], name) for name, _ in model.named_parameters())
    return (
        any(name.startswith(target) for name in modules)
        or target in dict(model.named_parameters())
        or any(type(module).__name__ == target for module in modules.values())
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def pin_input_quantizer(model: nn.Module, stem: str) -> None:
    """Quantize the images exactly as they are stored: value v of 0..255 to step v, no more, no less.

    An observer would find nearly this range by itself; the exact one makes the exported graph read
    uint8 pixels without rounding them again.

    Args:
        model: a model after QAT has begun.
        stem: name of the first convolution, which reads images in 0..1.
    """
    quantizer: Any = model.get_submodule(f"{stem}.quant.activation_post_process")
    observer = quantizer.activation_post_process
    with torch.no_grad():
        quantizer.scale.fill_(1.0 / 255.0)
        quantizer.zero_point.fill_(quantizer.quant_min)
        quantizer.observer_enabled[0] = 0
        observer.min_val.fill_(0.0)
        observer.max_val.fill_(1.0)
