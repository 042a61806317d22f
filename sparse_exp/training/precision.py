"""What numbers and memory layout a training uses: decided once, and said."""

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
    """Decide by configuration and host.

    ``auto`` takes bfloat16 only where the CPU multiplies it in hardware: emulated, it is slower than
    float32. channels_last is what oneDNN's convolutions are fastest with on every x86 CPU measured
    (benchmarks/training.py).
    """
    autocast = trainer.precision == "bf16" or (trainer.precision == "auto" and has_bf16)
    return Precision(autocast, channels_last=trainer.channels_last != "off")
