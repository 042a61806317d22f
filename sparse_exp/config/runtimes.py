"""The inference engines, as far as they must be known before one is imported.

A line here makes the name of an engine valid in ``hardware.engines``; `sparse_exp.engines` holds its class.
Only the standard library is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Runtime:
    """An inference engine.

    Attributes:
        requirement: what to install, as pip takes it.
        licence: under which the engine may be used.
        production: whether the licence allows use in production.
        isa: those of `sparse_exp.config.schema.ISA` without which it cannot run.
        cpu: the CPU that it needs, in words.
        skips_zeros: whether it computes convolutions with zeros faster.
        quantized: whether it runs networks that were quantized here.
        optional: whether a target is measured without it where it is not installed, as not every host has it.
        module: name of the package as Python imports it; empty: that of the engine.
    """

    requirement: str
    licence: str
    production: bool = True
    isa: tuple[str, ...] = ()
    cpu: str = "x86 with 64 bits"
    skips_zeros: bool = False
    quantized: bool = True
    optional: bool = False
    module: str = ""


RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {
        "deepsparse": Runtime(
            "deepsparse==1.8.0",
            "Neural Magic community",
            production=False,
            isa=("avx2",),
            cpu="x86 with AVX2 or AVX-512",
            skips_zeros=True,
            optional=True,
        ),
        "onnxruntime": Runtime("onnxruntime>=1.17", "MIT"),
        "openvino": Runtime("openvino>=2025.0", "Apache-2.0"),
        "mnn": Runtime(
            "MNN>=3.6",
            "Apache-2.0",
            cpu="x86 or ARM with 64 bits",
            skips_zeros=True,
            quantized=False,
            optional=True,
            module="MNN",
        ),
        "torch": Runtime("torch>=2.5", "BSD-3-Clause", quantized=False),
    }
)
"""By the name of the engine, which is that of its package in lower case."""


def may_be_shipped(engine: str) -> bool:
    """Whether the licence of an engine allows use in production."""
    return engine in RUNTIMES and RUNTIMES[engine].production


def skips_zeros(engine: str) -> bool:
    """Whether an engine computes convolutions with zeros faster."""
    return engine in RUNTIMES and RUNTIMES[engine].skips_zeros


def runs_quantized(engine: str) -> bool:
    """Whether an engine runs networks that were quantized here."""
    return engine not in RUNTIMES or RUNTIMES[engine].quantized
