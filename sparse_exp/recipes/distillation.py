"""Learning from a teacher: its predictions, and the feature maps of its layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from sparse_exp.config.schema import LossConfig
from sparse_exp.distributed.collectives import batch_mean, total, total_of
from sparse_exp.errors import RecipeError
from sparse_exp.quantization.quantizers import is_rounding, quantized_layers
from sparse_exp.recipes.modifiers import DistillationModifier, Modifier, PerLayerDistillationModifier

_log = logging.getLogger(__name__)
_BALANCE = (4.0, 1.0, 0.4)  # weights of objectness at strides 8, 16, 32, as in the task's loss


@dataclass(frozen=True)
class OutputTerm:
    """Imitation of the teacher's predictions between two epochs.

    Attributes:
        start: first epoch.
        end: epoch at which it ends; negative: never.
        hardness: share of the distillation loss in the total, 0..1; the task's loss has the rest.
        temperature: divides logits before they are compared; more than 0.
    """

    start: float
    end: float
    hardness: float
    temperature: float


@dataclass(frozen=True)
class LayerTerm:
    """Imitation of the teacher's feature maps between two epochs.

    Attributes:
        start: first epoch.
        end: epoch at which it ends; negative: never.
        gain: weight of this term in the total loss.
        layers: pairs of module names: the student's, the teacher's.
        normalize: divide by the mean square of the teacher's map.
        project: where the numbers of channels differ, learn a 1x1 convolution to the teacher's channels.
        epsilon: added to the divisor of ``normalize``.
    """

    start: float
    end: float
    gain: float
    layers: tuple[tuple[str, str], ...]
    normalize: bool
    project: bool
    epsilon: float


def detection_distillation(
    student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float
) -> Tensor:
    """Distance of a student's raw predictions from a teacher's; 0 where they are the same.

    Objectness counts everywhere; boxes and classes are weighted by the teacher's objectness (Mehta and
    Ozturk 2018, https://arxiv.org/abs/1805.09300). The distance of objectness and classes is the cross
    entropy with the teacher's probabilities minus the teacher's own entropy. Both are softened by the
    temperature and multiplied by its square, so that gradients keep their size. The distance of boxes is
    the sum of squared differences, in cells, of centres, and of the roots of sides in units of the anchor's.
    Levels and parts are weighted as in `sparse_exp.yolov5.DetectionLoss` with its published gains.

    Args:
        student: three maps (N, 3, ny, nx, 5 + nc), with gradient.
        teacher: three maps of the same shapes.
        temperature: more than 0.

    Returns:
        A scalar: the mean over the batch times N, as the task's loss. Where several processes train together,
        their results add up to it.
    """
    _, _, ny, nx, outputs = student[0].shape
    (images,) = total_of([len(student[0])])
    gains = LossConfig()
    scale = (ny * nx * 64) / 640**2  # the first level's cells are 8 px wide
    weights = student[0].new_tensor([gains.box, gains.obj * scale, gains.cls * (outputs - 5) / 80]).float()
    levels = [
        _level(s.float(), t.float(), temperature, balance, images)
        for s, t, balance in zip(student, teacher, _BALANCE, strict=True)
    ]
    return (torch.stack(levels).sum(0) * weights).sum() * images


def _level(student: Tensor, teacher: Tensor, temperature: float, balance: float, images: float) -> Tensor:
    """Box, objectness and class distance of one level, (3,).

    Args:
        student: its map of the level.
        teacher: its map of the level.
        temperature: of objectness and classes.
        balance: weight of the level's objectness.
        images: number of images in all processes.
    """
    objects = teacher[..., 4].sigmoid()
    weight = objects / total(objects.sum()).clamp(min=1.0)  # a teacher that sees no object teaches no boxes
    boxes = (2 * (student[..., :4].sigmoid() - teacher[..., :4].sigmoid())).square().sum(-1)
    objectness = batch_mean(_divergence(student[..., 4], teacher[..., 4], temperature), images) * balance
    classes = student.new_zeros(())
    if student.shape[-1] > 6:
        divergences = _divergence(student[..., 5:], teacher[..., 5:], temperature).mean(-1)
        classes = (weight * divergences).sum()
    return torch.stack([(weight * boxes).sum(), objectness, classes])


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened Bernoulli probabilities, elementwise."""
    student, teacher = student / temperature, teacher / temperature
    wanted = teacher.sigmoid()
    both = bce(student, wanted, reduction="none") - bce(teacher, wanted, reduction="none")
    return both * temperature**2


class Distiller:
    """Adds the distillation terms of a recipe to the task's loss.

    Args:
        student: the model in training.
        teacher: another detector for the same classes; it is put into evaluation mode.
        outputs: terms on predictions.
        layers: terms on feature maps.
        optimizer: the parameters of projections are added to it.

    Raises:
        RecipeError: the teacher lacks a layer that a term names.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        outputs: Sequence[OutputTerm],
        layers: Sequence[LayerTerm],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._student, self._teacher, self._optimizer = student, teacher.eval(), optimizer
        self._outputs, self._layers = outputs, layers
        self._projections: dict[str, nn.Conv2d] = {}
        self._maps: dict[tuple[str, str], Tensor] = {}
        self._handles: list[Any] = []
        for term in layers:
            for _, name in term.layers:
                _require_layer(teacher, name)
        self.watch()

    def watch(self) -> None:
        """Keep the layers' outputs from now on.

        A convolution that is quantized is left out: its batch norm is folded into it, so that its output no
        longer corresponds to the teacher's.
        """
        watched: dict[tuple[str, str], nn.Module] = {}
        quantized = quantized_layers(self._student) if is_rounding(self._student) else []
        for own, other in {pair for term in self._layers for pair in term.layers}:
            if own not in quantized:
                watched["student", own] = self._student.get_submodule(own)
                watched["teacher", other] = self._teacher.get_submodule(other)
            else:
                _log.info("The layer %s is quantized now and no longer imitates the teacher's.", own)
        for key, module in watched.items():
            self._handles.append(module.register_forward_hook(self._hook(key)))

    def _hook(self, key: tuple[str, str]) -> Callable[[nn.Module, Any, Tensor], None]:
        """A forward hook that keeps a module's output under a key."""

        def keep_output(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if key[0] == "teacher" or torch.is_grad_enabled():  # not while the student is evaluated
                self._maps[key] = output

        return keep_output

    def unwatch(self) -> None:
        """Stop keeping the layers' outputs."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._maps.clear()

    def add_to(self, loss: Tensor, images: Tensor, raw: Sequence[Tensor], epoch: float) -> Tensor:
        """Add all terms that act at an epoch to the task's loss.

        Args:
            loss: of the task: a mean times N.
            images: float (N, 3, H, W) in 0..1, from which the student computed ``raw``.
            raw: the student's three raw maps.
            epoch: of this step.

        Returns:
            ``(1 - hardness) * loss + hardness * distillation`` for each term on predictions in turn, plus
            for each term on feature maps ``gain`` times their mean squared difference times N.

        Raises:
            RecipeError: the feature maps of a pair of layers have different shapes and are not projected.
        """
        outputs = [term for term in self._outputs if _acts(term, epoch)]
        layers = [term for term in self._layers if _acts(term, epoch)]
        if not outputs and not layers:
            return loss
        dtype = raw[0].dtype
        half = dtype != torch.float32  # the student ran under autocast, and so must the teacher
        with torch.no_grad(), torch.autocast(images.device.type, dtype=dtype if half else None, enabled=half):
            teacher_raw: list[Tensor] = self._teacher(images)[1]
        (count,) = total_of([len(images)])
        with torch.autocast(raw[0].device.type, enabled=False):
            for term in outputs:
                distillation = detection_distillation(raw, teacher_raw, term.temperature)
                loss = (1.0 - term.hardness) * loss + term.hardness * distillation
            for layer_term in layers:
                loss = loss + layer_term.gain * self._imitation(layer_term, count) * count
        self._maps.clear()
        return loss

    def _imitation(self, term: LayerTerm, images: float) -> Tensor:
        """The mean squared difference of feature maps, summed over layers.

        Args:
            term: names the layers.
            images: number of images in all processes.
        """
        summed = torch.zeros((), device=next(self._student.parameters()).device)
        for own, other in term.layers:
            if ("student", own) not in self._maps:
                continue
            wanted = self._maps["teacher", other].float()
            given = self._projected(own, self._maps["student", own].float(), wanted, project=term.project)
            difference = batch_mean((given - wanted).square(), images)
            if term.normalize:
                difference = difference / (total(batch_mean(wanted.square(), images)) + term.epsilon)
            summed = summed + difference
        return summed

    def _projected(self, name: str, given: Tensor, wanted: Tensor, *, project: bool) -> Tensor:
        """A layer's feature map, projected to the teacher's channels where these differ."""
        if given.shape == wanted.shape:
            return given
        if not project or given.shape[2:] != wanted.shape[2:]:
            raise RecipeError(
                f"Expected the outputs of {name} and of the teacher's layer to have one shape, but got "
                f"{tuple(given.shape)} and {tuple(wanted.shape)}. Set project_features: True, or name others."
            )
        if name not in self._projections:
            new = nn.Conv2d(given.shape[1], wanted.shape[1], 1, bias=False).to(given.device)
            self._add_projection(name, new)
        projected: Tensor = self._projections[name](given)
        return projected

    def _add_projection(self, name: str, projection: nn.Conv2d) -> None:
        self._projections[name] = projection
        rate = self._optimizer.param_groups[0]["lr"]  # not that of the last group, the biases: it may differ
        group = {"params": list(projection.parameters()), "weight_decay": 0.0, "lr": rate}
        self._optimizer.add_param_group(group)

    def projections(self) -> dict[str, Tensor]:
        """Weights (C teacher, C student, 1, 1) of the projections by the student's layer, oldest first."""
        return {name: module.weight.detach() for name, module in self._projections.items()}

    @torch.no_grad()
    def restore_projections(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the projections of another distiller, and add them to the optimizer in the same order.

        Args:
            weights: of the other one's `projections`.
        """
        device = next(self._student.parameters()).device
        for name, weight in weights.items():
            projection = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False).to(device)
            projection.weight.copy_(weight)
            self._add_projection(name, projection)


def terms_of(
    modifiers: Sequence[Modifier], student: nn.Module, teacher: nn.Module, recipe: str
) -> tuple[list[OutputTerm], list[LayerTerm]]:
    """The terms that the distillation modifiers of a recipe add to the loss.

    Args:
        modifiers: all of the recipe.
        student: the model in training.
        teacher: the model to learn from.
        recipe: the recipe's name, for the message.

    Raises:
        RecipeError: a modifier pairs lists of layers of two lengths.
    """
    outputs, layers = [], []
    for m in modifiers:
        if isinstance(m, DistillationModifier):
            outputs.append(OutputTerm(m.start, m.end_epoch, m.hardness, m.temperature))
        elif isinstance(m, PerLayerDistillationModifier):
            pairs = _layer_pairs(m, student, teacher, recipe)
            options = (m.normalize, m.project_features, m.epsilon)
            layers.append(LayerTerm(m.start, m.end_epoch, m.gain, pairs, *options))
    return outputs, layers


def _layer_pairs(
    modifier: PerLayerDistillationModifier, student: nn.Module, teacher: nn.Module, recipe: str
) -> tuple[tuple[str, str], ...]:
    """The pairs of layers, (student's, teacher's); all convolutions in order where none are named."""
    own, other = modifier.student_layer_names, modifier.teacher_layer_names
    if own is None or other is None:
        own, other = (
            [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)] for model in (student, teacher)
        )
    if len(own) != len(other):
        raise RecipeError(
            f"{recipe} pairs {len(own)} layers of the student with {len(other)} of the teacher. "
            "Set student_layer_names and teacher_layer_names to lists of one length."
        )
    return tuple(zip(own, other, strict=True))


def _acts(term: OutputTerm | LayerTerm, epoch: float) -> bool:
    return term.start <= epoch and (term.end < 0 or epoch < term.end)


def _require_layer(teacher: nn.Module, name: str) -> None:
    try:
        teacher.get_submodule(name)
    except AttributeError as error:
        raise RecipeError(
            f"The recipe distills from the teacher's layer {name!r}, which the teacher does not have. "
            "Correct teacher_layer_names."
        ) from error
