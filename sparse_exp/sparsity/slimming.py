"""Which channels of a detector can go: what each is worth, and the least harm for a share of the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_exp.errors import ConfigError, expected
from sparse_exp.sparsity.measure import total_macs
from sparse_exp.yolov5.channels import IMAGE, Layer, channels_of, layers_of, readers
from sparse_exp.yolov5.model import STRIDES, YOLOv5, output_stride

Scores = Mapping[str, Tensor]
"""What each channel is worth: float64 (channels,), 0 or more, by group; see `sparse_exp.yolov5.channels`."""
Samples = Iterable[tuple[Tensor, Tensor]]
"""Batches: float images (N, 3, S, S) in 0..1 and targets (M, 6): image, class, x, y, w, h as shares of S."""


def gradient_scores(
    model: YOLOv5, samples: Samples, loss: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Any]]
) -> dict[str, Tensor]:
    """Score channels by what the loss of labelled images does when they are taken out, to first order.

    A channel is a gate behind its batch norm: without it the loss of an image changes by about
    ``gamma dL/dgamma + beta dL/dbeta``. The score is the mean square of that over the images, summed over the
    convolutions of its group (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771).

    Args:
        model: it computes in evaluation mode, and stays as it is.
        samples: some labelled images, looked at one by one.
        loss: from raw maps and targets, as `sparse_exp.yolov5.DetectionLoss`.
    """
    layers = [layer for layer in layers_of(model) if layer.gives]
    norms = [cast(nn.BatchNorm2d, model.get_submodule(f"{layer.name}.bn")) for layer in layers]
    sums = {name: torch.zeros(count, dtype=torch.float64) for name, count in channels_of(model).items()}
    parameters = [parameter for norm in norms for parameter in (norm.weight, norm.bias)]
    count = 0
    with _evaluating(model), _trained(parameters):
        for image, targets in _one_by_one(samples):
            raw = cast(Any, model(image))[1]
            gradients = torch.autograd.grad(loss(raw, targets)[0], parameters)
            for layer, norm, gamma, beta in zip(layers, norms, gradients[::2], gradients[1::2], strict=True):
                change = (norm.weight * gamma + norm.bias * beta).detach().double().cpu()
                sums[layer.gives] += change.square()
            count += 1
    return {name: total / max(1, count) for name, total in sums.items()}


@torch.no_grad()
def weight_scores(model: YOLOv5) -> dict[str, Tensor]:
    """Score channels without data, by their share of what the convolutions behind them compute.

    The variance of a channel is taken to be the square of its batch norm's gamma (those of a group whose
    outputs are added up), and what it gives to an output to be that times the squared norm of the weights
    between them. The score is its share of all that the output gets, as a mean over the outputs, summed over
    the convolutions that read it.

    Args:
        model: the detector.
    """
    layers, channels = layers_of(model), channels_of(model)
    variances = {name: torch.zeros(count, dtype=torch.float64) for name, count in channels.items()}
    for layer in layers:
        if layer.gives:
            gamma = cast(nn.BatchNorm2d, model.get_submodule(f"{layer.name}.bn")).weight
            variances[layer.gives] += gamma.double().cpu().square()
    scores = {name: torch.zeros_like(variance) for name, variance in variances.items()}
    for layer in layers:
        weight = model.get_submodule(layer.convolution).weight
        read = [(name, variances.get(name, torch.ones(3, dtype=torch.float64))) for name in layer.reads]
        given = torch.cat([v for _, v in read]) * cast(Tensor, weight).double().cpu().square().sum((2, 3))
        shares = (given / given.sum(1, keepdim=True).clamp_min(1e-30)).mean(0)
        for (name, _), share in zip(read, torch.split(shares, [len(v) for _, v in read]), strict=True):
            if name != IMAGE:
                scores[name] += share
    return scores


def choose_channels(
    model: YOLOv5, scores: Scores, share: float, *, whole: int | None = None, multiple: int = 8
) -> dict[str, Tensor]:
    """Choose the channels that stay, for the least harm at a share of the work.

    Again and again the cheapest few channels go: those whose scores are least for the multiplications that
    they save, so many that the group's width is a multiple. A group keeps at least one multiple.

    Args:
        model: the detector.
        scores: see `Scores`.
        share: of the multiplications that may remain, above 0 and at most 1.
        whole: the multiplications that this is a share of, for an image of 32 px; None: those of the model.
        multiple: of the widths; engines are fastest with multiples of 8 or 16.

    Returns:
        For each group that loses some the indices of those that stay, int64, rising.

    Raises:
        ConfigError: so little work cannot remain; names the least that can.
    """
    work = _Work(model)
    budget = share * (total_macs(model.quantizable_convolutions(), STRIDES[-1]) if whole is None else whole)
    order = {name: score.argsort(stable=True) for name, score in scores.items()}
    sums = {
        name: torch.cat([torch.zeros(1), scores[name][o].cumsum(0)]).tolist() for name, o in order.items()
    }
    gone = dict.fromkeys(order, 0)
    while work.total > budget:
        best: tuple[float, str, int] | None = None
        for name, width in work.widths.items():
            count = width % multiple or multiple
            if width - count >= multiple:
                harm = sums[name][gone[name] + count] - sums[name][gone[name]]
                best = min(best or (float("inf"), "", 0), (harm / work.saved(name, count), name, count))
        if best is None:
            least = math.ceil(100 * work.total / budget * share) / 100
            what = f"the share of the work of yolov5{model.size} that stays"
            raise ConfigError(
                expected(what, f"at least {least:.2f}", share, "Take as much, or a smaller model.")
            )
        _, name, count = best
        work.take(name, count)
        gone[name] += count
    return {name: order[name][count:].sort().values for name, count in gone.items() if count}


class _Work:
    """The multiplications of a detector for an image of 32 px, as its groups get narrower.

    Attributes:
        widths: number of channels in each group.
        total: multiplications.
    """

    def __init__(self, model: YOLOv5) -> None:
        layers, self.widths = layers_of(model), channels_of(model)
        convs = [cast(nn.Conv2d, model.get_submodule(layer.convolution)) for layer in layers]
        cells = [(STRIDES[-1] // output_stride(layer.convolution)) ** 2 for layer in layers]
        self._area = {
            layer.name: conv.kernel_size[0] * conv.kernel_size[1] * count
            for layer, conv, count in zip(layers, convs, cells, strict=True)
        }
        self._outputs = {layer.name: conv.out_channels for layer, conv in zip(layers, convs, strict=True)}
        self._makers = {name: [layer for layer in layers if layer.gives == name] for name in self.widths}
        self._readers = {name: list(readers(layers, name)) for name in self.widths}
        self.total = sum(
            self._area[layer.name] * self._inputs(layer) * self._width(layer) for layer in layers
        )

    def saved(self, group: str, count: int) -> int:
        """The multiplications that ``count`` channels fewer in a group save."""
        makers = sum(self._area[layer.name] * self._inputs(layer) for layer in self._makers[group])
        return count * (
            makers
            + sum(
                self._area[layer.name] * self._width(layer) * times for layer, times in self._readers[group]
            )
        )

    def take(self, group: str, count: int) -> None:
        """Make a group narrower."""
        self.total -= self.saved(group, count)
        self.widths[group] -= count

    def _inputs(self, layer: Layer) -> int:
        return sum(self.widths.get(name, 3) for name in layer.reads)

    def _width(self, layer: Layer) -> int:
        return self.widths[layer.gives] if layer.gives else self._outputs[layer.name]


@torch.no_grad()
def fit_norms(model: YOLOv5, images: Iterable[Tensor]) -> None:
    """Find the statistics of batch norms anew, as averages over some batches.

    Args:
        model: changed in place; in the same mode afterwards. In training, batch norms in evaluation mode are
            frozen, and stay as they are.
        images: batches of float images (N, 3, S, S) in 0..1.
    """
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in modes if isinstance(module, nn.BatchNorm2d)]
    frozen = [norm for norm in norms if model.training and not norm.training]
    momentum = [norm.momentum for norm in norms]
    model.train()
    for norm in frozen:
        norm.eval()
    for index, batch in enumerate(images):
        for norm in norms:
            norm.momentum = 1.0 / (index + 1)
        model(batch)
    for norm, before in zip(norms, momentum, strict=True):
        norm.momentum = before
    for module, training in modes.items():
        module.training = training


def _one_by_one(samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    for images, targets in samples:
        for index in range(len(images)):
            own = targets[targets[:, 0] == index].clone()
            own[:, 0] = 0
            yield images[index : index + 1], own


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def _trained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients of parameters be computed, also where a recipe keeps them as they are."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, trained in zip(parameters, before, strict=True):
            parameter.requires_grad_(trained)
