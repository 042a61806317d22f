"""The number format and memory layout of a training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_exp.config.schema import TrainerConfig


@dataclass(frozen=True)
class Precision:
    """How the floating-point phases of a training compute.

    Attributes:
        autocast: bfloat16 for convolutions in the forward and backward pass; weights stay float32.
        channels_last: NHWC memory layout.
    """

    autocast: bool
    channels_last: bool

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        numbers = "bf16 autocast" if self.autocast else "fp32"
        return f"{numbers}, {'channels_last' if self.channels_last else 'contiguous'}"


def choose_precision(trainer: TrainerConfig, *, has_bf16: bool) -> Precision:
    """Choose by the configuration and the host.

    ``auto`` chooses bfloat16 only where the CPU multiplies it in hardware, because emulated it is slower than
    float32. With channels_last, oneDNN's convolutions are fastest on every x86 CPU measured
    (benchmarks/training.py).

    Args:
        trainer: its ``precision`` and ``channels_last``.
        has_bf16: whether the CPU multiplies bfloat16 in hardware.
    """
    autocast = trainer.precision == "bf16" or (trainer.precision == "auto" and has_bf16)
    return Precision(autocast, channels_last=trainer.channels_last != "off")
