"""The classes of the checkpoint that the stage ``evaluate`` measures."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sparse_exp.errors import ConfigError
from sparse_exp.stages.evaluate import _require_classes

HERE = ("cat", "dog", "cow")


@pytest.mark.parametrize(
    "has", [("cat", "dog"), ("dog", "cat", "cow"), ("dog", "a", "b"), ("class0",), (*HERE, "pig")]
)
def test_other_classes_are_refused(has):
    with pytest.raises(
        ConfigError, match=r"^Expected x\.pt to be of the data set's classes cat, dog, cow"
    ) as e:
        _require_classes(Path("x.pt"), has, HERE)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("has", "said"), [(HERE, 0), (("class0", "class1", "class2"), 0), (("a", "b", "c"), 1)]
)
def test_other_names_for_as_many_classes_are_said(caplog, has, said):
    with caplog.at_level(logging.WARNING):
        _require_classes(Path("x.pt"), has, HERE)
    assert len(caplog.records) == said


def test_a_name_that_two_classes_have_is_no_other_order():
    _require_classes(Path("x.pt"), ("cat", "cat", "dog"), ("cat", "cat", "dog"))
