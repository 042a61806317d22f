"""Numbers that the processes of one training exchange, so that together they compute what one would.

Each process sees its share of every batch. What one process computes over the whole batch - the mean and
variance of a batch norm, the range of a quantizer, the number of matches that divides a loss - is computed
over all shares here: torch's batch norm for several processes (``SyncBatchNorm``, version 2.14) does not run
on CPUs. Gradients are added up by its DistributedDataParallel, see `sparse_exp.training.parallel`.

The processes are those of torch's default process group, which `sparse_exp.training.processes` sets up.
Where there is no group, the process trains alone: then sums over all processes are the values themselves,
and no module is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from sparse_exp.errors import StageFailed


class Disconnected(StageFailed):
    """Another process of the training is gone, or has not answered in time."""

    def __init__(self) -> None:
        super().__init__("Another process of the training is gone. Set trainer.devices=1.")

    def __reduce__(self) -> tuple[type[Disconnected], tuple[()]]:
        """Pickle without the message, which the constructor does not take."""
        return type(self), ()


def size() -> int:
    """Number of processes that train together; 1 where this one is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 to `size` - 1. Process 0 evaluates, tracks and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without gradient.

    Returns:
        A new tensor; ``values`` itself where this process is alone.

    Raises:
        Disconnected: a process is gone.
    """
    return _reduced(values, dist.ReduceOp.SUM)


def greatest(values: Tensor) -> Tensor:
    """The greatest of each value in all processes, without gradient.

    Returns:
        A new tensor; ``values`` itself where this process is alone.

    Raises:
        Disconnected: a process is gone.
    """
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, operation: Any) -> Tensor:
    if size() == 1:
        return values
    reduced = values.detach().clone(memory_format=torch.contiguous_format)
    _exchange(dist.all_reduce, reduced, operation)
    return reduced


def total_of(numbers: Sequence[float]) -> list[float]:
    """The sum of each number over all processes; exact for whole numbers up to 2^53."""
    if size() == 1:
        return list(numbers)
    return cast(list[float], total(torch.tensor(numbers, dtype=torch.float64, device=_device())).tolist())


def batch_mean(values: Tensor, images: float) -> Tensor:
    """This process's part of a mean over the whole batch; the parts of all processes add up to it.

    Args:
        values: (n, ...) of this process's n images, with gradient; n may be 0.
        images: number of images in all processes together.
    """
    return values.sum() / (values.shape[1:].numel() * images)


def differing_tensors(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same, bit by bit, in all processes.

    The sums of their bytes are compared, not the bytes: tensors that drifted apart differ in these too.
    """
    if size() == 1:
        return []
    as_bytes = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in state.values())
    sums = torch.stack([values.sum(dtype=torch.int64) for values in as_bytes]).to(_device())
    both = greatest(torch.cat([sums, -sums]))
    highest, lowest = both[: len(sums)], -both[len(sums) :]
    return [name for name, differs in zip(state, (highest != lowest).tolist(), strict=True) if differs]


def synchronize_statistics(model: nn.Module) -> None:
    """Make batch norms of a model use the statistics of the whole batch, in place.

    Modules keep their class, parameters, buffers and flags. In evaluation mode batch norms exchange nothing.
    Where this process is alone, nothing is changed. Batch norms of another class, such as those of QAT, call
    `batch_norm` themselves.
    """
    if size() == 1:
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.forward = MethodType(batch_norm, module)  # type: ignore[method-assign]


def batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Do what ``BatchNorm2d.forward`` does, with the statistics of the whole batch."""
    if not norm.training:
        return nn.BatchNorm2d.forward(norm, x)
    mean, variance, count = _statistics(x)
    _update_running_statistics(norm, mean, variance, count)
    normalized: Tensor = _Normalize.apply(x, norm.weight, norm.bias, mean, variance, count, norm.eps)
    return normalized


@torch.no_grad()
def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel over all processes, (C,) each, and the number of values of one."""
    own = _own_statistics(x.detach())
    rows = [torch.empty_like(own) for _ in range(size())]
    _exchange(dist.all_gather, rows, own)
    table = torch.stack(rows)
    counts, means, variances = table[:, :1], *table[:, 1:].chunk(2, dim=1)
    shares = counts / counts.sum()
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return mean.to(dtype), variance.to(dtype), counts.sum().to(dtype)


def _own_statistics(x: Tensor) -> Tensor:
    """Number of values, means and variances of this process's share, in float64 (1 + 2 C,)."""
    channels, count = x.shape[1], x.numel() // x.shape[1]
    row = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=x.device)
    if count:
        # The type of these two sets the type of the result; sums are computed in float32 or float64.
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        unused = [torch.zeros(channels, dtype=kind, device=x.device) for _ in range(2)]
        mean, variance = torch.ops.aten.batch_norm_update_stats(x, *unused, 0.0)
        row.copy_(torch.cat([row.new_tensor([count]), mean.double(), variance.double()]))
    return row


@torch.no_grad()
def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance * (count / (count - 1.0).clamp(min=1.0)), momentum)


class _Normalize(torch.autograd.Function):
    """Normalize a share of a batch by statistics of the whole, which depend on every share."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, count: Tensor,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """``x`` (n, C, H, W), n may be 0; ``count`` values of a channel gave ``mean`` and ``variance``."""
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        return _scaled(x, mean, variance, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The whole gradient of ``x``; of weight and bias the part that comes from this share."""
        x, weight, mean, variance, count = ctx.saved_tensors
        of_x, of_weight, of_bias = torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
        if x.numel():
            of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                gradients[0], x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
            )
        both = total(torch.cat([of_weight, of_bias])) / count
        slope, shift = both.chunk(2)
        # The gradient that passes through mean and variance is affine in the normalized values: a batch norm.
        scale = weight * (variance + ctx.eps).rsqrt()
        through = _scaled(x, mean, variance, scale * slope, scale * shift, ctx.eps)
        return of_x - through, of_weight, of_bias, None, None, None, None


def _scaled(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if not x.numel():  # torch's batch_norm divides by the size, and crashes
        return x.clone()
    return functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)


def _exchange(function: Callable[..., Any], *arguments: Any) -> None:
    try:
        function(*arguments)
    except RuntimeError as error:
        raise Disconnected from error


def _device() -> torch.device:
    """The device from which the process group sends small tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
