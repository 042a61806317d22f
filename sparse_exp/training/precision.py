"""The number format and memory layout of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sparse_exp.config.schema import TrainerConfig
from sparse_exp.training.devices import has_tensor_cores

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Precision:
    """How the floating-point phases of a training compute.

    Attributes:
        autocast: bfloat16 for convolutions in the forward and backward pass; weights stay float32.
        channels_last: NHWC memory layout.
        tf32: a GPU multiplies float32 with the mantissa of TF32.
    """

    autocast: bool
    channels_last: bool
    tf32: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        numbers = "bf16 autocast" if self.autocast else "fp32"
        layout = "channels_last" if self.channels_last else "contiguous"
        return ", ".join([numbers, *(["TF32"] if self.tf32 else []), layout])

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Let a GPU multiply float32 so within the block; a CPU has no such choice."""
        if device.type != "cuda":
            yield
            return
        convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
        before = convolutions.allow_tf32, products.allow_tf32
        convolutions.allow_tf32 = products.allow_tf32 = self.tf32
        try:
            yield
        finally:
            convolutions.allow_tf32, products.allow_tf32 = before


def choose_precision(
    trainer: TrainerConfig,
    *,
    has_bf16: bool,
    device: torch.device = _CPU,
    cuda: Any = torch.cuda,
) -> Precision:
    """Choose by the configuration and the device.

    ``auto`` chooses bfloat16, and TF32 for what stays in float32, only where the device multiplies them in
    hardware, because emulated they are slower than float32. With channels_last, oneDNN's convolutions are
    fastest on every x86 CPU measured (benchmarks/training.py).

    Args:
        trainer: its ``precision`` and ``channels_last``.
        has_bf16: whether the CPU multiplies bfloat16 in hardware.
        device: that computes.
        cuda: what is asked for the abilities of a GPU.
    """
    on_gpu = device.type == "cuda"
    able = has_tensor_cores(device, cuda=cuda) if on_gpu else has_bf16
    autocast = trainer.precision == "bf16" or (trainer.precision == "auto" and able)
    tf32 = on_gpu and able and trainer.precision != "fp32"
    return Precision(autocast, channels_last=trainer.channels_last != "off", tf32=tf32)
