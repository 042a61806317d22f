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

_log = logging.getLogger(__name__)
_BALANCE = (4.0, 1.0, 0.4)  # of objectness at strides 8, 16, 32, as in the task's loss


@dataclass(frozen=True)
class OutputTerm:
    """Imitation of the teacher's predictions between two epochs.

    Attributes:
        start: first epoch.
        end: epoch at which it ends; negative: never.
        hardness: share of the distillation loss in the total, 0..1; the task's loss has the rest.
        temperature: by which logits are divided before they are compared, more than 0.
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
        gain: weight of this loss beside the others.
        layers: (student's, teacher's) module names.
        normalize: divide by the mean square of the teacher's map.
        project: learn a 1x1 convolution to the teacher's channels where these differ.
        epsilon: added to what is divided by.
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
    """How far a student's raw predictions are from a teacher's; 0 where they are the same.

    Objectness counts everywhere; boxes and classes count as much as the teacher believes that there is
    an object (Mehta and Ozturk 2018, https://arxiv.org/abs/1805.09300). Objectness and classes: the
    cross entropy with the teacher's probabilities less the teacher's own entropy, both softened by the
    temperature and multiplied by its square, so that gradients keep their size. Boxes: squared
    differences, in cells, of centres, and of the roots of the sides in units of the anchor's. Levels and
    parts are weighted as in `sparse_exp.yolov5.DetectionLoss` with its published gains.

    Args:
        student: three maps (N, 3, ny, nx, 5 + nc), with gradient.
        teacher: likewise, of the same shapes.
        temperature: more than 0.

    Returns:
        A scalar, as the task's loss a mean times N; where several processes train together, a share of it.
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
    """Box, objectness and class difference of one level, (3,); ``images`` of all processes."""
    believed = teacher[..., 4].sigmoid()
    weight = believed / total(believed.sum()).clamp(min=1.0)  # a teacher that sees nothing teaches no boxes
    boxes = (2 * (student[..., :4].sigmoid() - teacher[..., :4].sigmoid())).square().sum(-1)
    objectness = batch_mean(_divergence(student[..., 4], teacher[..., 4], temperature), images) * balance
    classes = student.new_zeros(())
    if student.shape[-1] > 6:
        kinds = _divergence(student[..., 5:], teacher[..., 5:], temperature).mean(-1)
        classes = (weight * kinds).sum()
    return torch.stack([(weight * boxes).sum(), objectness, classes])


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened Bernoulli probabilities, elementwise."""
    student, teacher = student / temperature, teacher / temperature
    wanted = teacher.sigmoid()
    both = bce(student, wanted, reduction="none") - bce(teacher, wanted, reduction="none")
    return both * temperature**2


class Distiller:
    """Adds what a recipe's distillation modifiers ask for to the task's loss.

    Args:
        student: the model in training.
        teacher: another detector for the same classes; put into evaluation mode.
        outputs: terms on predictions.
        layers: terms on feature maps.
        optimizer: gets the parameters of projections.

    Raises:
        RecipeError: the teacher has no layer of a name.
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
        pairs = [pair for term in layers for pair in term.layers]
        self._kinds = {own: type(student.get_submodule(own)) for own, _ in pairs}
        for _, name in pairs:
            _require_layer(teacher, name)
        self.watch()

    def watch(self) -> None:
        """Look at the layers' outputs from now on.

        A convolution that quantization has replaced is left out: its batch norm is folded into it, so
        that its output is no longer what the teacher's is.
        """
        modules = {(owner, name): module for owner, name, module in self._watched()}
        for key, module in modules.items():
            self._handles.append(module.register_forward_hook(self._keep(key)))

    def _watched(self) -> list[tuple[str, str, nn.Module]]:
        found = []
        for own, other in {pair for term in self._layers for pair in term.layers}:
            module = self._student.get_submodule(own)
            if type(module) is self._kinds[own]:
                found += [("student", own, module), ("teacher", other, self._teacher.get_submodule(other))]
            else:
                _log.info("The layer %s is quantized now and no longer imitates the teacher's.", own)
        return found

    def _keep(self, key: tuple[str, str]) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if key[0] == "teacher" or torch.is_grad_enabled():  # not while the student is evaluated
                self._maps[key] = output

        return keep

    def unwatch(self) -> None:
        """Stop looking at the layers' outputs."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._maps.clear()

    def add_to(self, loss: Tensor, images: Tensor, raw: Sequence[Tensor], epoch: float) -> Tensor:
        """The task's loss together with all terms that act at an epoch.

        Args:
            loss: of the task, a mean times N.
            images: float (N, 3, H, W) in 0..1 that gave ``raw``.
            raw: the student's three raw maps.
            epoch: now.

        Returns:
            ``(1 - hardness) * loss + hardness * distillation`` for each term on predictions in turn, plus
            for each term on feature maps ``gain`` times their mean squared difference times N.
        """
        outputs = [term for term in self._outputs if _acts(term, epoch)]
        layers = [term for term in self._layers if _acts(term, epoch)]
        if not outputs and not layers:
            return loss
        taught = self._teach(images, raw[0].dtype)
        (count,) = total_of([len(images)])
        with torch.autocast(raw[0].device.type, enabled=False):
            for term in outputs:
                distillation = detection_distillation(raw, taught, term.temperature)
                loss = (1.0 - term.hardness) * loss + term.hardness * distillation
            for layer_term in layers:
                loss = loss + layer_term.gain * self._imitation(layer_term, count) * count
        self._maps.clear()
        return loss

    @torch.no_grad()
    def _teach(self, images: Tensor, dtype: torch.dtype) -> list[Tensor]:
        half = dtype != torch.float32  # the student ran under autocast: so does the teacher
        with torch.autocast(images.device.type, dtype=dtype if half else None, enabled=half):
            raw: list[Tensor] = self._teacher(images)[1]
        return raw

    def _imitation(self, term: LayerTerm, images: float) -> Tensor:
        """Sum over layers of the mean squared difference of feature maps, over the ``images`` of all."""
        summed = torch.zeros((), device=next(self._student.parameters()).device)
        for own, other in term.layers:
            if ("student", own) not in self._maps:
                continue
            wanted = self._maps["teacher", other].float()
            given = self._fitted(own, self._maps["student", own].float(), wanted, project=term.project)
            difference = batch_mean((given - wanted).square(), images)
            if term.normalize:
                difference = difference / (total(batch_mean(wanted.square(), images)) + term.epsilon)
            summed = summed + difference
        return summed

    def _fitted(self, name: str, given: Tensor, wanted: Tensor, *, project: bool) -> Tensor:
        if given.shape == wanted.shape:
            return given
        if not project or given.shape[2:] != wanted.shape[2:]:
            raise RecipeError(
                f"Expected the outputs of {name} and of the teacher's layer to have one shape, but got "
                f"{tuple(given.shape)} and {tuple(wanted.shape)}. Set project_features: True, or name others."
            )
        if name not in self._projections:
            self._project(name, nn.Conv2d(given.shape[1], wanted.shape[1], 1, bias=False).to(given.device))
        fitted: Tensor = self._projections[name](given)
        return fitted

    def _project(self, name: str, projection: nn.Conv2d) -> None:
        self._projections[name] = projection
        rate = self._optimizer.param_groups[0]["lr"]  # not that of the biases, which come last
        group = {"params": list(projection.parameters()), "weight_decay": 0.0, "lr": rate}
        self._optimizer.add_param_group(group)

    def projections(self) -> dict[str, Tensor]:
        """The weights (C teacher, C student, 1, 1) learned so far, by the student's layer, in order."""
        return {name: module.weight.detach() for name, module in self._projections.items()}

    @torch.no_grad()
    def project_with(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with what another distiller has learned, whose optimizer got these parameters in this order.

        Args:
            weights: of its `projections`.
        """
        device = next(self._student.parameters()).device
        for name, weight in weights.items():
            projection = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False).to(device)
            projection.weight.copy_(weight)
            self._project(name, projection)


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
