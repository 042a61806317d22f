"""Engines and SparseML for tests: what is not here is skipped, with the reason."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from sparse_exp.config.schema import ENGINES
from sparse_exp.hardware import host_facts
from sparse_exp.hardware.targets import unusable


def each_engine(*names: str) -> list:
    """Parameters for engines; none: all of them."""
    return [pytest.param(name, marks=needs(name), id=name) for name in names or ENGINES]


def needs(name: str) -> pytest.MarkDecorator:
    """Skips a test where an engine is not here."""
    why = unusable(name, host_facts())
    return pytest.mark.skipif(why is not None, reason=f"{name}: {why}")


needs_sparseml = pytest.mark.skipif(
    find_spec("sparseml") is None, reason="sparseml: it is there where the extra neuralmagic is installed"
)
