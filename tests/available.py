"""Engines as parameters of tests: those that are not here are skipped, with the reason."""

from __future__ import annotations

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
